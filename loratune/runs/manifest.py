"""The typed content of manifest.json, with its only reader and writer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from loratune.errors import Exit, LoratuneError
from loratune.plain_files import read_json_object
from loratune.recipe.loading import load_written_recipe
from loratune.runs.file_hashes import are_records
from loratune.runs.folder import ADAPTER, FORMAT_VERSION, MANIFEST, RECIPE, SEALED_BY, has_changed, with_seal
from loratune.runs.model_check import ModelCheck
from loratune.runs.record import RunRecord, read_record
from loratune.writing import write_json

AS_PLAIN = "infer, serve, merge and export take a copy of {} that lies elsewhere as a plain adapter"


@dataclass(frozen=True)
class TrainedBase:
    name: str
    """Its name in the recipe."""
    path: str
    """Its folder in training."""
    hashes: Mapping[str, Any] = field(default_factory=dict)
    """Result of `fingerprint_base`."""


@dataclass(frozen=True)
class TrainedTemplate:
    """The chat template of a run; values that earlier versions did not record are None."""

    sha256: str | None = None
    end_token_id: int | None = None
    generation_prompt: str | None = None
    """Value of prompt.generation_prompt."""
    completion: str | None = None
    """The generation prompt that loratune added, if the template writes none."""
    answer_start: str | None = None
    date: str | None = None
    """The date in the prompts, if the template writes one."""


@dataclass(frozen=True)
class TrainedFile:
    """A source of rows."""

    path: str
    sha256: str
    rows: int
    """Number of rows used."""
    seen: int
    """Number of rows in the file."""
    format: str
    ignored: tuple[str, ...] = ()
    """Columns that were not used."""


@dataclass(frozen=True)
class Manifest:
    base: TrainedBase | None = None
    """None if it is missing."""
    template: TrainedTemplate = field(default_factory=TrainedTemplate)
    data: tuple[TrainedFile, ...] = ()
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    """Library → version."""
    record: RunRecord | None = None
    """None in manifests of earlier versions; `run_record` then derives it from recipe.yaml."""
    created: str = ""
    """Start time of the run, ISO 8601."""
    files: Mapping[str, Mapping[str, Any]] | None = field(default_factory=dict)
    """File of the run → its `bytes` and `sha256`; None if the entry is invalid."""
    is_sealed: bool = False
    """Whether the manifest has a hash of itself; earlier versions wrote none."""
    checks: tuple[ModelCheck, ...] = ()
    """What was measured on the model before the first step; earlier versions did not record it."""
    gpus: int = 1
    """The number with which `sft --gpus` starts as many processes; 1 on a CPU and on several machines."""

    def values(self) -> dict[str, Any]:
        """Return the content of the file as JSON types."""
        base = {"base": {"name": self.base.name, "path": self.base.path, **self.base.hashes}} if self.base else {}
        return {
            "format_version": FORMAT_VERSION,
            "created": self.created,
            **base,
            "template": vars(self.template),
            "data": [vars(file) for file in self.data],
            "seed": self.seed,
            "versions": dict(self.versions),
            "files": dict(self.files or {}),
            **({"checks": [vars(check) for check in self.checks]} if self.checks else {}),
            **({"record": self.record.values()} if self.record else {}),
            "gpus": self.gpus,
        }


def write_manifest(run: Path, manifest: Manifest) -> None:
    """Replace a run's manifest, with a hash of its own values in it."""
    write_json(run / MANIFEST, with_seal(manifest.values()))


def write_files(run: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the file records in a run's manifest."""
    write_manifest(run, replace(read_manifest(run), files=files))


def read_manifest(run: Path) -> Manifest:
    """Read a run's manifest.

    Raises:
        LoratuneError: it is missing, damaged, changed, or of another loratune version.
    """
    values = read_json_object(run / MANIFEST)
    if values.get("format_version") != FORMAT_VERSION:
        raise LoratuneError(
            f"{run}: made by another version of loratune (format {values.get('format_version')}, this one reads "
            f"{FORMAT_VERSION})",
            Exit.MODEL,
        )
    if has_changed(values):
        raise LoratuneError(
            f"{run / MANIFEST}: has been changed since the run wrote it, so nothing of the run can be checked; restore "
            f"it. {AS_PLAIN.format(run / ADAPTER)}",
            Exit.MODEL,
        )
    try:
        return _parsed(values)
    except ValueError as error:
        raise LoratuneError(f"{run / MANIFEST}: {error}", Exit.MODEL) from error
    except (TypeError, KeyError, AttributeError) as error:
        raise LoratuneError(f"{run / MANIFEST}: damaged: {type(error).__name__}: {error}", Exit.MODEL) from error


def run_record(run: Path, manifest: Manifest) -> RunRecord:
    """Return the record of a run; for earlier versions it is derived from the recipe.

    Raises:
        LoratuneError: the recipe of such a run cannot be read.
    """
    if manifest.record:
        return manifest.record
    try:
        return RunRecord.of(load_written_recipe(run / RECIPE))
    except LoratuneError as error:
        raise LoratuneError(str(error), Exit.MODEL) from error


def _parsed(values: dict[str, Any]) -> Manifest:
    files = values.get("files", {})
    return Manifest(
        base=_base(values.get("base")),
        template=_known(TrainedTemplate, values.get("template", {})),
        data=tuple(_file(file) for file in values.get("data", [])),
        seed=values.get("seed", 0),
        versions=dict(values.get("versions", {})),
        record=read_record(values["record"]) if "record" in values else None,
        created=str(values.get("created", "")),
        files=files if are_records(files) else None,
        is_sealed=values.get(SEALED_BY) is not None,
        checks=tuple(_known(ModelCheck, check) for check in values.get("checks", [])),
        gpus=int(values.get("gpus", 1)),
    )


def _base(values: Any) -> TrainedBase | None:
    if not isinstance(values, dict) or not all(isinstance(values.get(key), str) for key in ("name", "path")):
        return None
    hashes = {key: value for key, value in values.items() if key not in ("name", "path")}
    return TrainedBase(values["name"], values["path"], hashes)


def _file(values: dict[str, Any]) -> TrainedFile:
    return replace(_known(TrainedFile, values), ignored=tuple(values.get("ignored", ())))


Kind = TypeVar("Kind", TrainedTemplate, TrainedFile, ModelCheck)


def _known(kind: type[Kind], values: dict[str, Any]) -> Kind:
    """Build a dataclass from the values that are its fields."""
    names = {one.name for one in fields(kind)}
    return kind(**{key: value for key, value in values.items() if key in names})
