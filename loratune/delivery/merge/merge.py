"""The steps of `loratune merge`, from an adapter to a verified merged model."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from loratune.choices import AddedTo
from loratune.delivery.merge.job import (
    Candidate,
    Job,
    MergeOptions,
    base_files,
    gather,
    refuse_unchanged,
    unchanged_told,
)
from loratune.delivery.merge.merged_weights import TooLargeError, plan_merge, write_merged
from loratune.delivery.merge.model_folder import write_model_files
from loratune.delivery.merge.needs import announce
from loratune.delivery.verification.beside import check_beside
from loratune.delivery.verification.proof import EXACT, NOTICED
from loratune.delivery.verification.read_back import read_back
from loratune.delivery.verification.report import about_changed, described
from loratune.delivery.verification.verify import prove
from loratune.errors import Exit, LoratuneError
from loratune.model.adapter.peft_merge import PeftMerge
from loratune.progress import byte_progress
from loratune.runs.card import write_merged_card
from loratune.runs.intact import recorded_files
from loratune.runs.merged import MergeSeconds, ReadBack
from loratune.runs.opening import AdapterSource
from loratune.runs.verification import (
    MergedModel,
    ModelProof,
    Verification,
    write_verification,
)
from loratune.writing import disk_errors_explained, folder_in_one_step

MOST_LOST = 0.9
"""Share of the update, by norm, that rounding may take without a warning."""


def merge_adapter(source: AdapterSource, output: Path, options: MergeOptions) -> Verification[MergedModel]:
    """Merge an adapter into its base, prove the result, and give it its name.

    Args:
        source: the adapter.
        output: folder of the merged model; until verified it has a temporary name.
        options: options of the merge.

    Returns:
        What verification.json says.

    Raises:
        LoratuneError: the inputs do not match, the disk is full, or verification failed; then `output` is not created.
    """
    return carry_out(gather(source, output.resolve(), options))


def carry_out(job: Job) -> Verification[MergedModel]:
    """The merge of what has been gathered; result and errors are those of `merge_adapter`."""
    output, options = job.output, job.options
    with disk_errors_explained(output), folder_in_one_step(output) as folder:
        candidates = _candidates(job, folder)
        announce(job, candidates, output)
        # Small files first: a template that cannot be written fails before minutes of writing weights.
        for candidate in candidates:
            changes = write_model_files(
                job.source, job.encoder, job.base, candidate.folder, options.dtype, candidate.plan
            )
            is_lora = job.source.record is None or job.source.record.method == "lora"
            write_merged_card(candidate.folder, "Merged model", job.settings.base, str(job.base.absolute()), is_lora)
        for candidate in candidates:
            _write(job, candidate)
            if options.verify:
                with _removal_told("If it happens again, the disk or the memory of this machine may be at fault"):
                    prove_files(job, candidate)
        _check_updates_survived(job, candidates[0])
        until_files_proved = _seconds_since_start()
        with _removal_told(
            "Its tensors were what PEFT makes of the adapter, so what differs is how it is loaded or computed with; "
            "--no-logits leaves this comparison out"
        ):
            chosen, models = prove_models(job, candidates)
        _keep(chosen, candidates, folder)
        seconds = MergeSeconds(until_files_proved, _seconds_since_start())
        merged = replace(described(job, chosen), changed_files=tuple(changes), models=models, seconds=seconds)
        return write_verification(folder, merged, None if options.stands_in_for else recorded_files(folder))


@contextmanager
def _removal_told(reason: str) -> Iterator[None]:
    """Add to a verification error that the temporary folder was removed, and a possible reason."""
    try:
        yield
    except LoratuneError as error:
        raise LoratuneError(
            f"{error.message}\nThe merged model has been removed. {reason}",
            error.exit_code,
            error.commands,
        ) from error


def prove_models(job: Job, candidates: list[Candidate]) -> tuple[Candidate, ModelProof]:
    """Run the models, where that is asked for; (the candidate to keep, what that has shown).

    Raises:
        LoratuneError: no candidate equals base + adapter.
    """
    if job.options.verify and job.options.logits:
        chosen, models = prove(job, candidates)
    else:
        chosen, models = candidates[0], ModelProof("files" if job.options.verify else "nothing")
    _warn_of_rounding(job, chosen, models)
    quantization = job.settings.quantization
    left = quantization if quantization != "none" and chosen.merge_base == "original" else None
    if told := about_changed(models.answers or (), left, chosen.plan.dtype_names):
        job.warn(told)
    return chosen, models


def prove_files(job: Job, candidate: Candidate) -> None:
    """Compare the written weights with PEFT's merge, and the other files with their sources.

    Raises:
        LoratuneError: something differs.
    """
    plan = candidate.plan
    peft = candidate.peft = PeftMerge(job.base, job.source.adapter, plan.vocabulary, job.is_tied)
    with byte_progress("reading back", plan.nbytes) as advance:
        candidate.read_back = read_back(plan, peft, candidate.files, candidate.folder, advance, job.options.dtype)
    check_beside(job.base, job.source.tokenizer_folder(job.base), job.encoder, candidate.folder)


def _check_updates_survived(job: Job, candidate: Candidate) -> None:
    """Refuse a merge that changes no tensor."""
    found = candidate.read_back
    if found is None or job.changes_nothing or not _is_all_lost(found):
        return
    is_widest = candidate.plan.tensors[found.unchanged[0]].info.dtype == torch.float32
    wider = [] if is_widest else job.with_options("keep small changes", dtype=torch.float32)
    refuse_unchanged(job, unchanged_told(found.unchanged, found.updated, _too_small(found)), wider)


def _is_all_lost(found: ReadBack) -> bool:
    return 0 < found.updated == len(found.unchanged)


def _too_small(found: ReadBack) -> str:
    return f"zero, or too small for {found.unchanged[0]} and its type"


def _warn_of_rounding(job: Job, chosen: Candidate, models: ModelProof) -> None:
    """Warn once of what the merged dtype cannot represent: by what the models do if they were run, else by its size."""
    found = chosen.read_back
    if found is None or _is_all_lost(found):  # told already, as `_check_updates_survived` refuses it
        return
    parity, effect = (models.logits or {}).get(chosen.merge_base), models.without_adapter
    told, dtype = list[str](), chosen.plan.dtype_names
    if parity and effect and parity.mean_kl > max(EXACT.mean_kl, NOTICED * effect.mean_kl):
        told.append(
            f"rounding to {dtype} takes a good part of what the adapter does: the merged model is {parity.mean_kl:.1e} "
            f"nats from base + adapter (mean KL), and the base alone {effect.mean_kl:.1e}. Merged with --dtype float32 "
            "it would lose nothing"
        )
    elif found.lost_to_rounding > MOST_LOST:
        told.append(
            f"rounding to {dtype} takes {found.lost_to_rounding:.1%} of the update, whose values are smaller than the "
            "rounding steps of the weights: little is left of the training. --dtype float32 keeps it; was the learning "
            "rate too low, or the run too short?"
        )
    if found.unchanged:
        told.append(unchanged_told(found.unchanged, found.updated, _too_small(found)))
    if told:
        job.warn("\n".join(told))


def _candidates(job: Job, folder: Path) -> list[Candidate]:
    kinds: list[AddedTo] = ["original"]
    if job.settings.quantization != "none":
        can_measure = job.options.verify and job.options.logits
        automatic: list[AddedTo] = ["original", "dequantized"] if can_measure else ["dequantized"]
        kinds = automatic if job.options.merge_base == "auto" else [job.options.merge_base]
    candidates = []
    for kind in kinds:
        files = base_files(job, kind)
        plan = plan_merge(files, job.updates, job.is_tied, job.options.dtype, job.options.shard_bytes)
        place = folder / kind if len(kinds) > 1 else folder
        place.mkdir(exist_ok=True)
        candidates.append(Candidate(kind, files, plan, place))
    return candidates


def _write(job: Job, candidate: Candidate) -> None:
    plan, files, folder = candidate.plan, candidate.files, candidate.folder
    with byte_progress("merging", plan.nbytes) as advance:
        try:
            write_merged(plan, files, folder, advance)
        except TooLargeError as error:
            raise LoratuneError(
                error.message, Exit.MODEL, job.with_options("keep its range", dtype=torch.bfloat16)
            ) from error


def _keep(chosen: Candidate, candidates: list[Candidate], folder: Path) -> None:
    """Move the better of two candidates into the output, and delete the other."""
    if chosen.folder == folder:
        return
    for path in chosen.folder.iterdir():
        path.rename(folder / path.name)
    for candidate in candidates:
        shutil.rmtree(candidate.folder)


def _seconds_since_start() -> float:
    """Return the seconds since the process started, which is what a user waits for."""
    return round(time.time() - psutil.Process().create_time(), 2)
