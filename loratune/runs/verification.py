"""verification.json: what was proved of a merged or exported folder. It is typed, and read and written here alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from loratune.choices import AddedTo, BaseChecked, Proof
from loratune.errors import Exit, LoratuneError
from loratune.plain_files import read_json
from loratune.recipe.sections import PromptSettings
from loratune.runs.card import has_card
from loratune.runs.exported import GgufReadBack, ServedAdapter
from loratune.runs.file_hashes import Records, are_records
from loratune.runs.folder import PROGRAM, SEALED_BY, VERIFICATION, has_changed, with_seal
from loratune.runs.merged import Combined, MergeSeconds, ReadBack
from loratune.runs.typed_json import WRITTEN_BESIDE, as_typed, require_version
from loratune.runs.versions import library_versions
from loratune.writing import write_json

VERIFICATION_VERSION = 1
MERGED, EXPORT = "merged model", "export"
UNCHECKED = (
    "so nothing of the folder can be checked; restore it, make the folder again, or remove the file: what is left is "
    "taken as any other model"
)
MODELS = "models"
"""Field of a merged model whose own fields stand beside it in the file."""


@dataclass(frozen=True)
class Parity:
    """A candidate's next-token distributions beside the reference's."""

    tokens: int
    """Positions compared."""
    largest_difference: float
    """Of two logits."""
    mean_kl: float
    """Mean Kullback-Leibler divergence of the candidate from the reference, in nats."""
    top1_agreement: float
    """Share of positions where both have the same likeliest token."""
    clear_disagreement: float
    """Share of positions where the candidate's likeliest token is less than half as likely as the reference's own."""
    largest_logit: float
    """The reference's, by absolute value: the scale of the difference."""

    @property
    def relative_difference(self) -> float:
        """The largest difference as a share of the largest logit, as `Bounds.difference` is; of 1 if all are below."""
        return self.largest_difference / max(1.0, self.largest_logit)


@dataclass(frozen=True)
class Bounds:
    """What rounding may do. Equal likeliest tokens are no bound: rounding decides between two that are as likely."""

    difference: float
    """Of logits, relative to the largest one."""
    mean_kl: float
    """nats."""
    clear_disagreement: float


@dataclass(frozen=True)
class Answer:
    """The merged model's answer to a question, and where base + adapter would have gone another way."""

    question: str
    merged: str
    adapter: str
    """Up to its first other token; the merged model's text if there is none."""
    tokens: int | None = None
    """Of the merged model's answer; None where an earlier version did not say, like the next two."""
    agreeing: int | None = None
    """How many of them are base + adapter's too, up to its first other token."""
    lead: float | None = None
    """nats by which that other token is likelier to base + adapter than the merged model's; 0 if there is none."""
    ended: bool | None = None
    """Whether the merged model's answer came to an end by itself; None where an earlier version did not say."""

    @property
    def has_changed(self) -> bool:
        return self.merged != self.adapter


@dataclass(frozen=True)
class ModelProof:
    """What has been verified, and what running the models has shown; None where they were not run."""

    verified: Proof = "nothing"
    logits: Mapping[str, Parity] | None = None
    """Of each way of merging that was tried, beside base + adapter."""
    logits_with_rounding: Mapping[str, Parity] | None = None
    """The same beside base + adapter with the rounding errors of the merged weights, for which the bounds hold."""
    compared_on: str | None = None
    """Which rows."""
    without_adapter: Parity | None = None
    """The base alone."""
    bounds: Bounds | None = None
    """That were held."""
    answers: tuple[Answer, ...] | None = None
    noise: tuple[Parity, ...] | None = None
    """Base + adapter beside itself with other rounding, from which the bounds follow; None for the usual ones."""
    computed_on: str | None = None
    """Name of the GPU, or the CPU and its threads; None where an earlier version did not say."""


@dataclass(frozen=True)
class MergedModel:
    """What is said of a merged model; None, or what earlier versions did alone, where they said nothing."""

    base: str | None = None
    """Its name, without a local path."""
    base_checked: BaseChecked = "nothing"
    quantization_in_training: str = "none"
    merge_base: AddedTo = "original"
    base_sha256: str | None = None
    """Of all its tensors, as `base.tensors_sha256` of a run's manifest."""
    adapter_sha256: str | None = None
    """Of the adapter's weights."""
    combined: Combined | None = None
    thinking: bool = False
    """As prompt.enable_thinking."""
    generation_prompt: str = "template"
    date: str | None = None
    dtype: str | None = None
    """Of the weights."""
    bytes: int | None = None
    """Of all tensors."""
    read_back: ReadBack | None = None
    warnings: tuple[str, ...] = ()
    changed_files: tuple[str, ...] = ()
    """What differs from the base's files beside the weights."""
    models: Annotated[ModelProof, WRITTEN_BESIDE] = field(default_factory=ModelProof)
    seconds: MergeSeconds | None = None


@dataclass(frozen=True)
class ExportedFolder:
    """What is said of an export; None for what its format has not. `logits` are beside the merged model's."""

    format: str
    file: str | None = None
    read_back: GgufReadBack | Parity | None = None
    logits: Parity | None = None
    read_by: str | None = None  # what read a GGUF file for the logits
    max_lora_rank: int | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    served: ServedAdapter | None = None
    base_sha256: str | None = None
    """These three are those of the merged model that was exported, or of the adapter."""
    adapter_sha256: str | None = None
    combined: Combined | None = None


Proved = TypeVar("Proved", bound="MergedModel | ExportedFolder")


@dataclass(frozen=True)
class WrittenWith:
    """What wrote the file."""

    versions: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Verification(Generic[Proved]):
    """What a folder's verification.json says."""

    proved: Proved
    versions: Mapping[str, str] = field(default_factory=dict)
    """Library → version."""
    files: Records | None = None
    """Each other file's `bytes` and `sha256`; None where an earlier version recorded none."""
    is_sealed: bool = False
    """Whether the file has a hash of its own, without which it may say anything; versions before wrote none."""

    @property
    def kind(self) -> str:
        """What the folder is."""
        return MERGED if isinstance(self.proved, MergedModel) else EXPORT

    def values(self) -> dict[str, Any]:
        """In JSON types, in the file's layout, without the hash of its own."""
        proved: dict[str, Any] = {}
        for name, value in asdict(self.proved).items():
            proved |= value if name == MODELS else {name: value}
        files = {"files": dict(self.files)} if self.files is not None else {}
        known = {"program": PROGRAM, "format_version": VERIFICATION_VERSION, "versions": dict(self.versions)}
        return {**known, "kind": self.kind, **proved, **files}

    def sealed_values(self) -> dict[str, Any]:
        """The same with the hash, as the file holds it."""
        return with_seal(self.values())


AnyVerification = Verification[MergedModel | ExportedFolder]


def write_verification(folder: Path, proved: Proved, files: Records | None = None) -> Verification[Proved]:
    """Write verification.json, the last file of a folder, with a hash of its own values in it.

    Args:
        folder: with everything else in it.
        proved: of it.
        files: from `loratune.runs.intact.recorded_files`; a folder that goes away again needs none.

    Returns:
        What the file says.
    """
    verification = Verification(proved, library_versions(), files, is_sealed=True)
    write_json(folder / VERIFICATION, verification.sealed_values())
    return verification


def read_verification(folder: Path) -> AnyVerification | None:
    """What a folder's verification.json says; None where there is none, or it is another program's.

    Raises:
        LoratuneError: it cannot be read, is damaged, has been changed or replaced, or was written by another version of
            loratune.
    """
    path = folder / VERIFICATION
    if not os.path.lexists(path):
        return None
    values = read_json(path)
    if not isinstance(values, dict) or values.get("program") != PROGRAM:
        if has_card(folder) or (isinstance(values, dict) and values.get("kind") in (MERGED, EXPORT)):
            raise LoratuneError(f"{path}: not what loratune wrote there, {UNCHECKED}", Exit.MODEL)
        return None
    require_version(values, VERIFICATION_VERSION, path)
    if has_changed(values):
        raise LoratuneError(f"{path}: has been changed since it was written, {UNCHECKED}", Exit.MODEL)
    files = values.get("files")
    if "files" in values and not (files and are_records(files)):
        raise LoratuneError(f"{path}: damaged: it does not say what the folder's files were", Exit.MODEL)
    versions = as_typed(WrittenWith, values, path).versions or {}
    return Verification(_proved(values, path), versions, files, values.get(SEALED_BY) is not None)


def prompt_of(merged: MergedModel, path: Path) -> PromptSettings:
    """Return a merged model's prompt settings; its template includes all others. `path` is that of its file.

    Raises:
        LoratuneError: a value is none that the setting takes.
    """
    known = {"enable_thinking": merged.thinking, "generation_prompt": merged.generation_prompt, "date": merged.date}
    return as_typed(PromptSettings, known, path)


def _proved(values: dict[str, Any], path: Path) -> MergedModel | ExportedFolder:
    kind = values.get("kind", EXPORT if "format" in values else MERGED)  # the first versions did not say
    if kind == MERGED:
        merged = replace(as_typed(MergedModel, values, path), models=as_typed(ModelProof, values, path))
        prompt_of(merged, path)  # what cannot be prompted with is damaged for those who ask nothing, too
        return merged
    if kind == EXPORT:
        return as_typed(ExportedFolder, values, path)
    raise LoratuneError(f"{path}: damaged: kind: {kind!r} is neither {MERGED!r} nor {EXPORT!r}", Exit.MODEL)
