"""Reports the disk space and memory that a merge needs, before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from loratune import console
from loratune.delivery.merge.merged_weights import dtype_names
from loratune.errors import Exit, LoratuneError, counted
from loratune.model.adapter.files import WEIGHTS_FILE
from loratune.model.architecture.structure import text_values
from loratune.plain_files import read_json_object

if TYPE_CHECKING:
    from loratune.delivery.merge.job import Candidate, Job

SIDE_FILES_BYTES = 30_000_000
LIBRARIES_BYTES, CHECK_LIBRARIES_BYTES = 250_000_000, 250_000_000
"""Memory of torch alone, and of transformers, PEFT and two tokenizers in addition."""


def announce(job: Job, candidates: list[Candidate], output: Path) -> None:
    """Print what will be merged, and the required resources.

    Args:
        job: the merge.
        candidates: the planned outputs.
        output: folder of the merged model.

    Raises:
        LoratuneError: the disk does not have enough room.
    """
    plan = candidates[0].plan
    needed = sum(candidate.plan.nbytes for candidate in candidates) + SIDE_FILES_BYTES
    free = shutil.disk_usage(candidates[0].folder).free
    files = counted(len(plan.shards), "file")
    place = "a temporary folder" if job.options.stands_in_for else output
    console.table(
        [
            (
                "adapter",
                f"{job.source.title}: changes {len(plan.updated)} of {counted(len(plan.tensors), 'tensor')}",
            ),
            ("base", f"{job.settings.base}, {dtype_names(candidates[0].files.infos.values())}"),
            ("into", " and ".join(f"the {candidate.merge_base} base" for candidate in candidates)),
            ("writes", f"{console.memory(plan.nbytes)} of {plan.dtype_names} in {files} to {place}"),
            ("disk", f"{console.memory(needed)} needed, {console.memory(free)} free"),
            ("memory", f"at most {console.memory(memory_bound(job, candidates))}"),
        ],
        title="merge",
    )
    for warning in job.warnings:
        console.warn(warning)
    if needed > free:
        raise LoratuneError(
            f"{output}: the merged model needs {console.memory(needed)} of disk and {console.memory(free)} are free; "
            "make room, or choose another disk with --output",
            Exit.IO,
        )


def memory_bound(job: Job, candidates: list[Candidate]) -> int:
    """Return the maximum bytes of the process, except mapped file pages, which the system can reclaim."""
    config = text_values(read_json_object(job.base / "config.json"))
    bound = LIBRARIES_BYTES + CHECK_LIBRARIES_BYTES + (job.source.adapter / WEIGHTS_FILE).stat().st_size
    if job.options.verify and job.options.logits:
        activations = 40_000 * int(config["intermediate_size"])
        logits = 32 * 4 * 7 * int(config["vocab_size"])
        bound += activations + logits
    if job.settings.quantization != "none":  # the reference model, with its embedding in float32
        bound += candidates[0].plan.nbytes
    return bound
