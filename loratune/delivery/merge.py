"""From an adapter to a merged model that has proved itself: the flow of `loratune merge`, top to bottom."""

from __future__ import annotations

import functools
import importlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from loratune import console
from loratune.commands import Command, free_place, loratune
from loratune.data.encoding import Encoder
from loratune.delivery.merged_weights import MergePlan, TooLargeError, plan_merge, write_merged
from loratune.delivery.model_folder import write_model_files
from loratune.delivery.needs import announce
from loratune.delivery.read_back import ReadBack, read_back
from loratune.delivery.report import described
from loratune.delivery.sources import check_pair
from loratune.delivery.template import about_the_date
from loratune.delivery.update import TensorUpdate, read_updates
from loratune.errors import Exit, LoratuneError
from loratune.model.adapter_tensors import EMBEDDING
from loratune.model.files import find_base, weight_files
from loratune.model.hardware import detect_hardware
from loratune.model.tensor_files import TensorFiles
from loratune.model.tying import head_is_tied
from loratune.recipe.sections import ModelSettings
from loratune.runs.card import write_merged_card
from loratune.runs.folder import VERIFICATION, prepare_output
from loratune.runs.opening import AdapterSource, base_settings, check_vocabulary
from loratune.runs.verification import write_verification
from loratune.writing import disk_errors_explained, folder_in_one_step


@dataclass(frozen=True)
class MergeOptions:
    """How to merge."""

    model: str | None = None
    """Where the base lies, if not where the run knows it."""
    dtype: torch.dtype | None = None
    """Of the merged weights; None keeps the base's."""
    shard_bytes: int = 5_000_000_000
    merge_base: str = "auto"
    """For an adapter of a quantised base: original, dequantized, or auto for the one that comes closer."""
    verify: bool = True
    logits: bool = True
    """Whether the verification runs the models."""
    force: bool = False
    overwrite: bool = False
    stands_in_for: Path | None = None
    """The output of an export, of which the merge is only a step; None for one that is asked for itself."""

    def command(self, purpose: str, source: AdapterSource, output: Path) -> Command:
        """The command line that merges so."""
        flags = {
            "--adapter": source.place,
            "--model": self.model,
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
    """One way to merge; a quantised run has two."""

    merge_base: str
    files: TensorFiles
    plan: MergePlan
    folder: Path
    read_back: ReadBack | None = None


@dataclass
class Job:
    """What is merged into what."""

    source: AdapterSource
    settings: ModelSettings
    base: Path
    updates: dict[str, TensorUpdate]
    is_tied: bool
    options: MergeOptions
    warnings: list[str]
    output: Path

    @property
    def changes_nothing(self) -> bool:
        """Whether all of the adapter is zero."""
        return all(update.is_nothing for update in self.updates.values())

    def with_options(self, purpose: str, **others: Any) -> list[Command]:
        """The same merge with other options, as a command; none for combined adapters, which it could not restate."""
        if self.source.combined:
            return []
        options, output = replace(self.options, **others), self.output
        if options.stands_in_for:  # an export does not take a merge's options
            purpose += ", and export the merged model with --model"
            output = free_place(options.stands_in_for.with_name(f"{options.stands_in_for.name}-merged"))
            options = replace(options, overwrite=False)
        return [options.command(purpose, self.source, output)]

    @functools.cached_property
    def encoder(self) -> Encoder:
        """How the training rendered prompts."""
        load_tokenizer = importlib.import_module("loratune.model.tokenizer").load_tokenizer  # transformers: seconds
        return Encoder(load_tokenizer(self.source.tokenizer_folder(self.base)), self.source.prompt)


def merge_adapter(source: AdapterSource, output: Path, options: MergeOptions) -> dict[str, Any]:
    """Merge an adapter into its base, prove the result, and give it its name.

    Args:
        source: the adapter.
        output: folder of the merged model; until it is proved, it lies beside it under another name.
        options: how.

    Returns:
        What verification.json holds.

    Raises:
        LoratuneError: something does not fit, there is no room, or the merged model is not base + adapter; then nothing
            is left at `output`.
    """
    output = output.resolve()
    job = gather(source, output, options)
    with disk_errors_explained(output), folder_in_one_step(output) as folder:
        candidates = _candidates(job, folder)
        announce(job, candidates, output)
        # What is small comes first: a template that cannot be written is told before minutes of writing.
        for candidate in candidates:
            changes = write_model_files(job.source, job.base, candidate.folder, options.dtype, candidate.plan)
            write_merged_card(candidate.folder, "Merged model", job.settings.base, str(job.base.absolute()))
        for candidate in candidates:
            _write(job, candidate)
            if options.verify:
                _check_beside(job, candidate.folder)
        _check_updates_survived(job, candidates[0])
        seconds = {"until_files_proved": _seconds_since_start()}
        chosen, proof = _prove(job, candidates)
        _keep(chosen, candidates, folder)
        seconds["total"] = _seconds_since_start()
        report = described(job, chosen) | {"changed_files": changes} | proof | {"seconds": seconds}
        return write_verification(folder, "merged model", report, hashes=options.stands_in_for is None)


def _prove(job: Job, candidates: list[Candidate]) -> tuple[Candidate, dict[str, Any]]:
    """Run the models, where that is asked for; (the candidate to keep, what verification.json says of it)."""
    if job.options.verify and job.options.logits:
        verify = importlib.import_module("loratune.delivery.verify")  # transformers and PEFT: seconds
        chosen, proof = verify.prove(job, candidates)
        return chosen, {"verified": "files and logits", **proof}
    return candidates[0], {"verified": "files" if job.options.verify else "nothing", "logits": None, "answers": None}


def _check_beside(job: Job, folder: Path) -> None:
    beside = importlib.import_module("loratune.delivery.beside")
    tokenizer = job.source.tokenizer_folder(job.base)
    beside.check_beside(job.base, tokenizer, job.encoder, folder)


def _check_updates_survived(job: Job, candidate: Candidate) -> None:
    """Refuse a merge that leaves everything as it was; tell of tensors whose update was too small to hold."""
    found = candidate.read_back
    if found is None or not found.unchanged or job.changes_nothing:
        return
    name, is_widest = found.unchanged[0], candidate.plan.tensors[found.unchanged[0]].info.dtype == torch.float32
    wider = [] if is_widest else job.with_options("keep small changes", dtype=torch.float32)
    _tell_of_unchanged(job, found.unchanged, found.updated, f"zero, or too small for {name} and its type", wider)


def _tell_of_unchanged(
    job: Job, unchanged: Sequence[str], updated: int, change: str, advice: Sequence[Command] = ()
) -> None:
    """Refuse a merge that leaves everything as it was, unless forced; warn of one that leaves a part."""
    message = (
        f"{len(unchanged)} of {updated} tensors that the adapter changes still equal the base's: the change is {change}"
    )
    if len(unchanged) == updated and not job.options.force:
        raise LoratuneError(
            f"{message}. The merged model would be the base itself; was the adapter trained?",
            Exit.MODEL,
            [*advice, *job.with_options("merge it as it is", force=True)],
        )
    console.warn(message)
    job.warnings.append(message)


def gather(source: AdapterSource, output: Path, options: MergeOptions) -> Job:
    """What is merged into what, with everything checked that headers, configs and the adapter tell.

    Args:
        source: the adapter.
        output: folder of the merged model, resolved.
        options: how.

    Raises:
        LoratuneError: something does not fit, or nothing would change.
    """
    with disk_errors_explained(output):
        prepare_output(output, options.overwrite, "merged model", VERIFICATION)
    settings = base_settings(source, options.model)
    base = find_base(settings)
    _check_apart(output, base, source.adapter)
    infos, is_tied = TensorFiles(weight_files(base)).infos, head_is_tied(base)
    warnings = check_pair(source, settings.base, base, options.force)
    if options.merge_base != "auto" and settings.quantization == "none":
        raise LoratuneError("--merge-base is for adapters that were trained on a quantised base", Exit.USAGE)
    trained_day = (source.manifest or {}).get("template", {}).get("date")
    if trained_day and not options.stands_in_for:
        warnings.append(about_the_date("transformers and vLLM write", trained_day))
    updates = read_updates(source.adapter, infos, is_tied)
    rows = infos[EMBEDDING].shape[0]
    brought = updates[EMBEDDING].replacement if EMBEDDING in updates else None
    warnings += check_vocabulary(source, base, rows, rows if brought is None else len(brought))
    job = Job(source, settings, base, updates, is_tied, options, warnings, output)
    if job.changes_nothing:
        _tell_of_unchanged(job, sorted(updates), len(updates), "zero")
    return job


def _check_apart(output: Path, base: Path, adapter: Path) -> None:
    for kind, place in (("base model", base.resolve()), ("adapter", adapter.resolve())):
        if output.is_relative_to(place) or place.is_relative_to(output):
            raise LoratuneError(f"{output} and the {kind} at {place} overlap; choose another --output", Exit.USAGE)


def _candidates(job: Job, folder: Path) -> list[Candidate]:
    kinds = ["original"]
    if job.settings.quantization != "none":
        can_measure = job.options.verify and job.options.logits
        automatic = ["original", "dequantized"] if can_measure else ["dequantized"]
        kinds = automatic if job.options.merge_base == "auto" else [job.options.merge_base]
    paths = weight_files(job.base)
    candidates = []
    for kind in kinds:
        files = TensorFiles(paths) if kind == "original" else _dequantized(paths, job.settings)
        plan = plan_merge(files, job.updates, job.is_tied, job.options.dtype, job.options.shard_bytes)
        place = folder / kind if len(kinds) > 1 else folder
        place.mkdir(exist_ok=True)
        candidates.append(Candidate(kind, files, plan, place))
    return candidates


def _dequantized(paths: list[Path], settings: ModelSettings) -> TensorFiles:
    quantized_files = importlib.import_module("loratune.model.quantized_files")  # bitsandbytes
    files: TensorFiles = quantized_files.DequantizedFiles(paths, settings, detect_hardware())
    return files


def _write(job: Job, candidate: Candidate) -> None:
    plan, files, folder = candidate.plan, candidate.files, candidate.folder
    with console.byte_progress("merging", plan.nbytes) as advance:
        try:
            write_merged(plan, files, folder, advance)
        except TooLargeError as error:
            raise LoratuneError(
                error.message, Exit.MODEL, job.with_options("keep its range", dtype=torch.bfloat16)
            ) from error
    if job.options.verify:
        peft_merge = importlib.import_module("loratune.model.peft_merge")  # transformers and PEFT: seconds
        peft = peft_merge.PeftMerge(job.base, job.source.adapter, plan.vocabulary, job.is_tied)
        with console.byte_progress("reading back", plan.nbytes) as advance:
            candidate.read_back = read_back(plan, peft, files, folder, advance)


def _keep(chosen: Candidate, candidates: list[Candidate], folder: Path) -> None:
    """Bring the better of two candidates up into the output, and drop the other."""
    if chosen.folder == folder:
        return
    for path in chosen.folder.iterdir():
        path.rename(folder / path.name)
    for candidate in candidates:
        shutil.rmtree(candidate.folder)


def _seconds_since_start() -> float:
    """Since the process began: what a user waits for."""
    return round(time.time() - psutil.Process().create_time(), 2)
