"""From an adapter to a merged model that has proved itself: the flow of `loratune merge`, top to bottom."""

from __future__ import annotations

import functools
import importlib
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from loratune import console
from loratune.data.encoding import Encoder
from loratune.delivery.merged_weights import MergePlan, plan_merge, write_merged
from loratune.delivery.model_folder import write_model_files
from loratune.delivery.needs import announce
from loratune.delivery.read_back import ReadBack, read_back
from loratune.delivery.template import about_the_date
from loratune.delivery.update import TensorUpdate, read_updates
from loratune.errors import Exit, LoratuneError
from loratune.model.adapter_files import WEIGHTS_FILE
from loratune.model.adapter_tensors import EMBEDDING
from loratune.model.files import find_base, weight_files
from loratune.model.hardware import detect_hardware
from loratune.model.tensor_files import TensorFiles
from loratune.model.tying import head_is_tied
from loratune.recipe.sections import ModelSettings
from loratune.runs.card import base_name, write_merged_card
from loratune.runs.folder import FORMAT_VERSION, PROGRAM, VERIFICATION, file_sha256, prepare_output
from loratune.runs.opening import AdapterSource, base_settings, check_same_base, check_vocabulary
from loratune.runs.versions import library_versions
from loratune.writing import disk_errors_explained, folder_in_one_step, write_json


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
    is_temporary: bool = False
    """Whether it is only a step of an export."""


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
    with disk_errors_explained(output):
        output = output.resolve()
        prepare_output(output, options.overwrite, "merged model", VERIFICATION)
    job = _gather(source, output, options)
    with disk_errors_explained(output), folder_in_one_step(output) as folder:
        candidates = _candidates(job, folder)
        announce(job, candidates, output)
        for candidate in candidates:
            _write(job, candidate)
            changes = write_model_files(job.source, job.base, candidate.folder, options.dtype, candidate.plan)
            write_merged_card(candidate.folder, "Merged model", job.settings.base, str(job.base.absolute()))
            if options.verify:
                _check_beside(job, candidate.folder)
        _check_updates_survived(job, candidates[0])
        seconds = {"until_files_proved": _seconds_since_start()}
        chosen, proof = _prove(job, candidates)
        _keep(chosen, candidates, folder)
        seconds["total"] = _seconds_since_start()
        report = {"program": PROGRAM, "format_version": FORMAT_VERSION, "versions": library_versions()}
        report |= {"kind": "merged model"} | _described(job, chosen) | {"changed_files": changes}
        report |= proof | {"seconds": seconds}
        write_json(folder / VERIFICATION, report)
    return report


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
    if candidate.read_back is None or not candidate.read_back.unchanged:
        return
    unchanged, updated = candidate.read_back.unchanged, candidate.read_back.updated
    message = (
        f"{len(unchanged)} of {updated} tensors that the adapter changes still equal the base's: the change is "
        f"zero, or too small for {unchanged[0]} and its type"
    )
    if len(unchanged) == updated and not job.options.force:
        raise LoratuneError(
            f"{message}. The merged model would be the base itself; was the adapter trained? --dtype float32 keeps "
            "small changes, --force merges as it is",
            Exit.MODEL,
        )
    console.warn(message)
    job.warnings.append(message)


def _gather(source: AdapterSource, output: Path, options: MergeOptions) -> Job:
    settings = base_settings(source, options.model)
    base = find_base(settings)
    _check_apart(output, base, source.adapter)
    paths = weight_files(base)
    warnings = check_same_base(source, settings.base, base, paths, options.force)
    if options.merge_base != "auto" and settings.quantization == "none":
        raise LoratuneError("--merge-base is for adapters that were trained on a quantised base", Exit.USAGE)
    trained_day = (source.manifest or {}).get("template", {}).get("date")
    if trained_day and not options.is_temporary:
        warnings.append(about_the_date("transformers and vLLM write", trained_day))
    is_tied = head_is_tied(base)
    infos = TensorFiles(paths).infos
    updates = read_updates(source.adapter, infos, is_tied)
    rows = infos[EMBEDDING].shape[0]
    brought = updates[EMBEDDING].replacement if EMBEDDING in updates else None
    warnings += check_vocabulary(source, base, rows, rows if brought is None else len(brought))
    return Job(source, settings, base, updates, is_tied, options, warnings)


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
        write_merged(plan, files, folder, advance)
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


def _described(job: Job, chosen: Candidate) -> dict[str, Any]:
    return {
        "base": base_name(job.settings.base, str(job.base.absolute())),  # the folder may go to a hub: no local paths
        "quantization_in_training": job.settings.quantization,
        "merge_base": chosen.merge_base,
        "adapter_sha256": file_sha256(job.source.adapter / WEIGHTS_FILE),
        "combined": job.source.combined,
        "thinking": job.source.prompt.thinking,
        "generation_prompt": job.source.prompt.generation_prompt,
        "date": job.source.prompt.date,
        "dtype": chosen.plan.dtype_names,
        "bytes": chosen.plan.nbytes,
        "read_back": asdict(chosen.read_back) if chosen.read_back else None,
        "warnings": [_without_paths(warning, job) for warning in job.warnings],
    }


def _without_paths(text: str, job: Job) -> str:
    """The folder may go to a hub, and where things lie here is nobody's business."""
    for place in (job.base, job.source.adapter, job.source.run):
        for path in (place, place.absolute()) if place else ():
            text = text.replace(str(path), path.name)
    return text


def _seconds_since_start() -> float:
    """Since the process began: what a user waits for."""
    return round(time.time() - psutil.Process().create_time(), 2)
