"""Verifies merged models, exports and runs again: files by their hashes, and a merge by all of its checks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from typing_extensions import TypedDict

from loratune.choices import Dtype
from loratune.delivery.merge.job import Candidate, Job, MergeOptions, base_files, job_of
from loratune.delivery.merge.merge import prove_files, prove_models
from loratune.delivery.merge.merged_weights import MergePlan, plan_merge
from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.model.adapter.files import WEIGHTS_FILE
from loratune.model.files import weight_files
from loratune.model.weights.tensor_files import TensorFiles
from loratune.plain_files import require_folder
from loratune.runs.folder import MANIFEST, VERIFICATION, file_sha256
from loratune.runs.intact import check_files, is_idle, is_loaded, seal_remarks
from loratune.runs.opening import AdapterSource, open_whole_run
from loratune.runs.verification import AnyVerification, MergedModel, read_verification
from loratune.runs.verification_layout import ExportedFile, MergedFile

AS_MERGED = MergeOptions()
KINDS = "a merged model, an export or a run folder"


@dataclass(frozen=True)
class Verified:
    """What has become of a folder that was verified once."""

    folder: Path
    kind: str
    """merged model, export or run."""
    sealed: bool
    """Whether there are hashes to compare with, and a hash of the file that holds them."""
    files: int
    """How many were compared."""
    unchanged: int
    """How many of them are as they were."""
    parts: tuple[str, ...] = ()
    """Files and folders of a run that were compared; none of a model, of which every file was."""
    proved: AnyVerification | None = None
    """What verification.json says, or what has been proved again; None of a run."""
    proved_again: bool = False
    remarks: tuple[str, ...] = ()
    """Differences in files that no program loads."""
    warnings: tuple[str, ...] = ()

    def values(self) -> dict[str, Any]:
        """In JSON types, as `VerifiedValues`; the hashes of the files are left out."""
        proved = self.proved and {key: value for key, value in self.proved.values().items() if key != "files"}
        return {**vars(self), "folder": str(self.folder), "proved": proved}


class VerifiedValues(TypedDict):
    """What has become of a folder that was verified once."""

    folder: str
    kind: Literal["merged model", "export", "run"]
    sealed: bool
    """Whether there are hashes to compare with, and a hash of the file that holds them."""
    files: int
    """How many were compared."""
    unchanged: int
    """How many of them are as they were."""
    parts: list[str]
    """Files and folders of a run that were compared; none of a model, of which every file was."""
    proved: MergedFile | ExportedFile | None
    """What verification.json says, or what has been proved again; null of a run."""
    proved_again: bool
    remarks: list[str]
    """Differences in files that no program loads."""
    warnings: list[str]


def verify_folder(folder: Path, adapter: AdapterSource | None = None, options: MergeOptions = AS_MERGED) -> Verified:
    """Read every file of a folder and compare its hash with the recorded one.

    Args:
        folder: a merged model, an export, or a run.
        adapter: repeats the full verification of a merged model.
        options: options of that verification; dtype and kind of base are the folder's.

    Raises:
        LoratuneError: there are no records, a file that programs load has changed, or the merged model is not base +
            adapter.
    """
    require_folder(folder, KINDS)
    verification = read_verification(folder)
    if verification is None:
        return _verify_run(folder, adapter)
    check = check_files(folder, verification)
    if check is None and adapter is None:
        can_prove = isinstance(verification.proved, MergedModel) and not verification.proved.combined
        raise LoratuneError(
            f"{folder / VERIFICATION} holds no hashes: an earlier version of loratune made the folder. Make it again"
            f"{', or have the merge proved with --adapter' if can_prove else ''}",
            Exit.MODEL,
        )
    problems = check.lines(is_loaded) if check else []
    if problems:
        raise LoratuneError(f"{folder} is not as it was verified:\n{bullet_list(problems)}", Exit.MODEL)
    warnings = seal_remarks(folder, verification)
    proved = verification
    if adapter:
        merged, unchecked = _prove_again(folder, verification, adapter, options)
        proved, warnings = replace(verification, proved=merged), [*warnings, *unchecked]
    elif isinstance(verification.proved, MergedModel):
        warnings = [*warnings, *verification.proved.warnings]  # from when it was merged
    return Verified(
        folder,
        verification.kind,
        sealed=check is not None and verification.is_sealed,
        files=check.files if check else 0,
        unchanged=check.unchanged if check else 0,
        proved=proved,
        proved_again=adapter is not None,
        remarks=tuple(check.lines(is_idle)) if check else (),
        warnings=tuple(warnings),
    )


def _verify_run(folder: Path, adapter: AdapterSource | None) -> Verified:
    if not (folder / MANIFEST).is_file():
        raise LoratuneError(
            f"{folder}: nothing can be verified: no {VERIFICATION} of loratune and no {MANIFEST} in it; give {KINDS}, "
            "or make the model again",
            Exit.MODEL,
        )
    if adapter:
        raise LoratuneError(f"{folder}: no merged model, so there is no merge to prove", Exit.USAGE)
    source = open_whole_run(folder)
    manifest = source.manifest
    files, is_sealed = (manifest.files or {}, manifest.is_sealed) if manifest else ({}, False)
    parts = tuple(dict.fromkeys(name.partition("/")[0] for name in files))
    return Verified(folder, "run", is_sealed, len(files), len(files), parts, warnings=tuple(source.remarks))


def _prove_again(
    folder: Path, verification: AnyVerification, source: AdapterSource, options: MergeOptions
) -> tuple[MergedModel, list[str]]:
    """What `merge` proves, of a folder that is there already; and what could not be checked, or was let through."""
    known = verification.proved
    if not isinstance(known, MergedModel):
        raise LoratuneError(f"{folder}: no merged model, so there is no merge to prove", Exit.USAGE)
    if known.combined:
        raise LoratuneError(f"{folder} was merged from several adapters: its hashes alone can be verified", Exit.USAGE)
    if known.adapter_sha256 != file_sha256(source.adapter / WEIGHTS_FILE):
        raise LoratuneError(f"{folder} was merged from another adapter than {source.adapter}", Exit.MODEL)
    dtype = next((getattr(torch, name) for name in get_args(Dtype) if name == known.dtype), None)
    job = job_of(source, folder.resolve(), replace(options, dtype=dtype))
    files = base_files(job, known.merge_base)
    candidate = Candidate(known.merge_base, files, _plan_of(folder, job, files), folder)
    prove_files(job, candidate)
    _, models = prove_models(job, [candidate])
    return replace(known, read_back=candidate.read_back, models=models), job.warnings


def _plan_of(folder: Path, job: Job, files: TensorFiles) -> MergePlan:
    """Return the plan of a merge with the folder's own distribution over files.

    Raises:
        LoratuneError: the folder has other tensors.
    """
    plan = plan_merge(files, job.updates, job.is_tied, job.options.dtype, job.options.shard_bytes)
    names = {path.name: list(TensorFiles([path]).infos) for path in weight_files(folder)}
    if strange := sorted({name for found in names.values() for name in found} ^ plan.tensors.keys()):
        told = [f"{name}: {'is missing' if name in plan.tensors else 'is not of them'}" for name in strange]
        raise LoratuneError(
            f"{folder} holds other tensors than this adapter and its base make:\n{bullet_list(told, limit=5)}",
            Exit.MODEL,
        )
    return replace(plan, shards={file: [plan.tensors[name].info for name in found] for file, found in names.items()})
