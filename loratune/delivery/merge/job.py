"""The inputs of a merge, checked as far as headers, configs and the adapter allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loratune import console
from loratune.choices import AddedTo, MergeBase
from loratune.commands import Command, free_place, loratune
from loratune.data.encoding.encoder import Encoder
from loratune.delivery.merge.merged_weights import MergePlan
from loratune.delivery.merge.sources import check_pair, training_encoder
from loratune.delivery.merge.update import TensorUpdate, read_updates
from loratune.delivery.template import about_the_date
from loratune.errors import Exit, LoratuneError, agreeing, counted
from loratune.model.adapter.peft_merge import PeftMerge
from loratune.model.architecture.file_layout import FileLayout, file_layout
from loratune.model.architecture.roles import transposed_matrices
from loratune.model.architecture.vocabulary import vocabulary_of
from loratune.model.base import require_quantisable
from loratune.model.config import empty_model, load_config
from loratune.model.files import find_base, weight_files
from loratune.model.hardware import detect_hardware
from loratune.model.tying import head_is_tied
from loratune.model.weights.tensor_files import TensorFiles
from loratune.protocols import CausalModel
from loratune.recipe.sections import ModelSettings
from loratune.runs.base_check import check_vocabulary
from loratune.runs.folder import VERIFICATION
from loratune.runs.merged import ReadBack
from loratune.runs.opening import AdapterSource, base_settings
from loratune.runs.output import prepare_output, require_apart
from loratune.runs.probe import read_probe
from loratune.writing import disk_errors_explained


@dataclass(frozen=True)
class MergeOptions:
    model: str | None = None
    """Location of the base, if moved."""
    dtype: torch.dtype | None = None
    """Dtype of the merged weights; None keeps the base's."""
    shard_bytes: int = 5_000_000_000
    merge_base: MergeBase = "auto"
    verify: bool = True
    logits: bool = True
    """Whether the verification also runs the models."""
    force: bool = False
    overwrite: bool = False
    stands_in_for: Path | None = None
    """Output folder of the export that needs this merge as a step; None for a merge of its own."""

    def command(self, purpose: str, source: AdapterSource, output: Path) -> Command:
        """Return the command with these options."""
        flags = {
            "--adapter": source.place,
            "--base-model": self.model,
            "--dtype": str(self.dtype).removeprefix("torch.") if self.dtype else None,
            "--merge-base": self.merge_base if self.merge_base != "auto" else None,
            "--no-verify": not self.verify,
            "--no-logits": not self.logits,
            "--overwrite": self.overwrite,
            "--force": self.force,
            "--output": output,
        }
        return loratune(purpose, "merge", flags)


@dataclass
class Candidate:
    """One way to merge; a run with quantisation has two."""

    merge_base: AddedTo
    files: TensorFiles
    plan: MergePlan
    folder: Path
    peft: PeftMerge | None = None
    """The adapter as PEFT understands it, once the files have been compared with that."""
    read_back: ReadBack | None = None


@dataclass
class Job:
    """Everything that a merge needs."""

    source: AdapterSource
    settings: ModelSettings
    base: Path
    updates: dict[str, TensorUpdate]
    """Name of a tensor in the base's files → its update."""
    is_tied: bool
    options: MergeOptions
    warnings: list[str]
    output: Path
    encoder: Encoder
    """Renders prompts as in training."""
    model: CausalModel
    """The base without values."""
    layout: FileLayout
    """Which parameters of it the base's files hold."""

    @property
    def changes_nothing(self) -> bool:
        """Whether the adapter is entirely zero."""
        return all(update.is_nothing for update in self.updates.values())

    def warn(self, message: str) -> None:
        """Print a warning, and keep it for verification.json."""
        console.warn(message)
        self.warnings.append(message)

    def with_options(self, purpose: str, **others: Any) -> list[Command]:
        """Return the command of this merge with other options; empty for combined adapters, which it cannot express."""
        if self.source.combined:
            return []
        options, output = replace(self.options, **others), self.output
        if options.stands_in_for:  # an export has no such options
            purpose += ", and export the merged model with --model"
            output = free_place(options.stands_in_for, "-merged")
            options = replace(options, overwrite=False)
        return [options.command(purpose, self.source, output)]


def gather(source: AdapterSource, output: Path, options: MergeOptions) -> Job:
    """Gather and check the inputs of a merge.

    Args:
        source: the adapter.
        output: folder of the merged model, resolved.
        options: options of the merge.

    Raises:
        LoratuneError: the inputs do not match, or the merge would change nothing.
    """
    with disk_errors_explained(output):
        prepare_output(output, options.overwrite, "merged model", VERIFICATION)
    if options.verify and options.logits:
        read_probe(source.run)  # a damaged one is an error now, not after minutes of writing
    job = job_of(source, output, options)
    if job.changes_nothing:
        refuse_unchanged(job, unchanged_told(sorted(job.updates), len(job.updates), "zero"))
    return job


def job_of(source: AdapterSource, output: Path, options: MergeOptions) -> Job:
    """Gather the inputs of a merge whose folder may exist, even if the adapter changes nothing.

    Raises:
        LoratuneError: the inputs do not match.
    """
    settings = base_settings(source, options.model)
    base = find_base(settings)
    require_apart(output, "base model", base)
    require_apart(output, "adapter", source.adapter)
    infos, is_tied = TensorFiles(weight_files(base)).infos, head_is_tied(base)
    warnings = check_pair(source, settings.base, base, options.force)
    encoder = training_encoder(source, base)
    if options.merge_base != "auto" and settings.quantization == "none":
        raise LoratuneError("--merge-base is for adapters that were trained on a quantised base", Exit.USAGE)
    trained_day = source.trained_day
    if trained_day and not options.stands_in_for:
        warnings.append(about_the_date("transformers and vLLM write", trained_day))
    model = empty_model(load_config(base))
    require_quantisable(settings, model)
    layout = file_layout(model, infos)
    changes = read_updates(source.adapter, layout.infos(infos), is_tied, transposed_matrices(model))
    updates = layout.in_files(changes, infos)
    embedding = vocabulary_of(infos).embedding
    rows = infos[embedding].shape[0]
    brought = updates[embedding].replacement if embedding in updates else None
    warnings += check_vocabulary(source, base, rows, rows if brought is None else len(brought))
    return Job(source, settings, base, updates, is_tied, options, warnings, output, encoder, model, layout)


def base_files(job: Job, kind: AddedTo) -> TensorFiles:
    """Return the base's tensors, original or dequantised.

    Args:
        job: the merge.
        kind: which.
    """
    paths = weight_files(job.base)
    if kind == "original":
        return TensorFiles(paths)
    from loratune.model.weights.quantized_files import DequantizedFiles  # takes bitsandbytes

    return DequantizedFiles(paths, job.settings, detect_hardware())


def unchanged_told(unchanged: Sequence[str], updated: int, change: str) -> str:
    """Return the sentence about updated tensors that still equal the base's."""
    return (
        f"{len(unchanged)} of {counted(updated, 'tensor')} that the adapter changes still "
        f"{agreeing(len(unchanged), 'equal')} the base's: the change is {change}"
    )


def refuse_unchanged(job: Job, told: str, advice: Sequence[Command] = ()) -> None:
    """Raise because a merge changes nothing; warn if that is forced."""
    if not job.options.force:
        raise LoratuneError(
            f"{told}. The merged model would be the base itself; was the adapter trained?",
            Exit.MODEL,
            [*advice, *job.with_options("merge it as it is", force=True)],
        )
    job.warn(told)
