"""Verifies merged models, exports and runs again: files by their hashes, and a merge by all of its checks."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from loratune.delivery.merge.job import Candidate, Job, MergeOptions, base_files, job_of
from loratune.delivery.merge.merge import prove_files, prove_models
from loratune.delivery.merge.merged_weights import MergePlan, plan_merge
from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.model.adapter.files import WEIGHTS_FILE
from loratune.model.files import weight_files
from loratune.model.weights.tensor_files import TensorFiles
from loratune.runs.folder import MANIFEST, VERIFICATION, file_sha256
from loratune.runs.opening import AdapterSource, open_settled_adapter
from loratune.runs.verification import check_files, is_idle, is_loaded, read_verification

MERGED = "merged model"
AS_MERGED = MergeOptions()


def verify_folder(
    folder: Path, adapter: AdapterSource | None = None, options: MergeOptions = AS_MERGED
) -> dict[str, Any]:
    """Compare the hash of every file in a folder with the recorded one.

    Args:
        folder: a merged model, an export, or a run.
        adapter: repeats the full verification of a merged model.
        options: options of that verification; dtype and kind of base are the folder's.

    Returns:
        folder, kind, sealed (whether there are hashes to compare, also of a run's manifest), proved (the content of
        verification.json; None for a run), proved_again, files (number), remarks (differences in files that no program
        loads), warnings.

    Raises:
        LoratuneError: there are no records, a file that programs load has changed, or the merged model is not base +
            adapter.
    """
    values = read_verification(folder)
    if values is None:
        return _verify_run(folder, adapter)
    check = check_files(folder, values)
    if check is None and adapter is None:
        raise LoratuneError(
            f"{folder / VERIFICATION} holds no hashes: an earlier version of loratune made the folder. Make it again, "
            "or have a merge proved with --adapter",
            Exit.MODEL,
        )
    problems = check.lines(is_loaded) if check else []
    if problems:
        raise LoratuneError(f"{folder} is not as it was verified:\n{bullet_list(problems)}", Exit.MODEL)
    proved = {key: value for key, value in values.items() if key != "files"}
    warnings: list[str] = []
    if adapter:
        again, warnings = _prove_again(folder, values, adapter, options)
        proved |= again
    return {
        "folder": str(folder),
        "kind": values.get("kind"),
        "sealed": check is not None,
        "files": check.files if check else 0,
        "remarks": check.lines(is_idle) if check else [],
        "proved": proved,
        "proved_again": adapter is not None,
        "warnings": warnings,
    }


def _verify_run(folder: Path, adapter: AdapterSource | None) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        raise LoratuneError(
            f"{folder}: nothing can be verified: no {VERIFICATION} of loratune and no {MANIFEST} in it; give a "
            "merged model, an export or a run folder, or make the model again",
            Exit.MODEL,
        )
    if adapter:
        raise LoratuneError(f"{folder}: no merged model, so there is no merge to prove", Exit.USAGE)
    source = open_settled_adapter(folder)
    manifest = source.manifest
    files, is_sealed = (manifest.files or {}, manifest.is_sealed) if manifest else ({}, False)
    return {"folder": str(folder), "kind": "run", "sealed": is_sealed, "files": len(files), "remarks": [],
            "proved": None, "proved_again": False, "warnings": source.remarks}  # fmt: skip


def _prove_again(
    folder: Path, values: dict[str, Any], source: AdapterSource, options: MergeOptions
) -> tuple[dict[str, Any], list[str]]:
    """Verify an existing folder like `merge`; also return warnings about what could not be checked, or was forced."""
    if values.get("kind") != MERGED:
        raise LoratuneError(f"{folder}: no merged model, so there is no merge to prove", Exit.USAGE)
    if values.get("combined"):
        raise LoratuneError(f"{folder} was merged from several adapters: its hashes alone can be verified", Exit.USAGE)
    if values.get("adapter_sha256") != file_sha256(source.adapter / WEIGHTS_FILE):
        raise LoratuneError(f"{folder} was merged from another adapter than {source.adapter}", Exit.MODEL)
    named = values.get("dtype")
    dtype = getattr(torch, named) if named in ("float32", "float16", "bfloat16") else None
    job = job_of(source, folder.resolve(), replace(options, dtype=dtype))
    kind = values.get("merge_base", "original")
    files = base_files(job, kind)
    candidate = Candidate(kind, files, _plan_of(folder, job, files), folder)
    prove_files(job, candidate)
    _, proved = prove_models(job, [candidate])
    return {"read_back": asdict(candidate.read_back) if candidate.read_back else None, **proved}, job.warnings


def _plan_of(folder: Path, job: Job, files: TensorFiles) -> MergePlan:
    """Return the plan of a merge with the folder's own distribution over files.

    Raises:
        LoratuneError: the folder has other tensors.
    """
    plan = plan_merge(files, job.updates, job.is_tied, job.options.dtype, job.options.shard_bytes)
    names = {path.name: list(TensorFiles([path]).infos) for path in weight_files(folder)}
    if sorted(name for found in names.values() for name in found) != sorted(plan.tensors):
        raise LoratuneError(f"{folder} holds other tensors than this adapter and its base make", Exit.MODEL)
    return replace(plan, shards={file: [plan.tensors[name].info for name in found] for file, found in names.items()})
