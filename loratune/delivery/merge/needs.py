"""Reports the disk space and memory that a merge needs, before anything is written."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from loratune import console
from loratune.delivery.merge.merged_weights import dtype_names
from loratune.errors import Exit, LoratuneError, agreeing, counted
from loratune.model.adapter.files import WEIGHTS_FILE
from loratune.model.architecture.file_layout import prediction_tensors
from loratune.model.architecture.roles import expert_stacks
from loratune.model.architecture.structure import layer_count
from loratune.model.architecture.vocabulary import vocabulary_of
from loratune.model.hardware import detect_hardware, resolve_dtype

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
    predicting = prediction_tensors(job.layout.unused, layer_count(job.model.config))
    if predicting:
        console.say(
            f"{counted(len(predicting), 'tensor')} for the prediction of further tokens, such as {predicting[0]}, "
            f"{agreeing(len(predicting), 'stay')} the base's: speculative decoding with them accepts fewer "
            "tokens of a fine-tuned model"
        )
    if needed > free:
        raise LoratuneError(
            f"{output}: the merged model needs {console.memory(needed)} of disk and {console.memory(free)} are free; "
            "make room, or choose another disk with --output",
            Exit.IO,
        )


def memory_bound(job: Job, candidates: list[Candidate]) -> int:
    """Return the maximum bytes of the process, except mapped file pages, which the system can reclaim."""
    infos, stacked = candidates[0].files.infos, expert_stacks(job.model)
    shapes = job.layout.shapes({name: info.shape for name, info in infos.items()})
    bound = LIBRARIES_BYTES + CHECK_LIBRARIES_BYTES + (job.source.adapter / WEIGHTS_FILE).stat().st_size
    # Of a stack, one matrix is in memory at a time: as it is, in float32 and with its update, twice in float64.
    bound += 40 * max((math.prod(shapes[name][1:]) for name in stacked), default=0)
    if job.options.verify and job.options.logits:
        vocabulary = vocabulary_of(shapes)
        matrices = [shape for name, shape in shapes.items() if len(shape) == 2 and name not in vocabulary]
        activations = 40_000 * max(max(shape) for shape in matrices)
        logits = 32 * 4 * 7 * candidates[0].plan.vocabulary
        bound += activations + logits
    if job.settings.quantization != "none":  # the reference model is loaded before what is not quantised is mapped
        dtype = resolve_dtype(job.settings.dtype, detect_hardware())
        bound += sum(dtype.itemsize * math.prod(shape) for shape in shapes.values())
    return bound
