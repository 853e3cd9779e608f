"""Computes batches per epoch, micro-batches per step, and steps per run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loratune.data.assembly.packing import spread, spread_within
from loratune.errors import Exit, LoratuneError
from loratune.recipe.sections import TrainingSettings


@dataclass(frozen=True)
class StepPlan:
    """The numbers of batches and steps of a run."""

    batches: int
    """Batches per epoch, over all processes."""
    largest_batch_tokens: int
    """Positions of the largest batch."""
    accumulation: int
    """Micro-batches per step and process."""
    rows_per_step: int
    """Rows per step over all processes; an average when packing."""
    steps_per_epoch: int
    steps: int
    """Steps of the whole run."""


def packed_batches(training: TrainingSettings, lengths: NDArray[np.int64], seed: int = 0) -> list[list[int]]:
    """Return the sequences of each packed batch; the seed decides between sequences of equal length.

    The number of batches is that without packing, or the minimum for training.tokens_per_batch.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))
    sizes = lengths[order]
    if training.tokens_per_batch:
        batches = spread_within(sizes, max(training.tokens_per_batch, int(sizes.max())))
    else:
        batches = spread(sizes, math.ceil(len(sizes) / training.batch_size))
    return [order[members].tolist() for members in batches]


def plan_steps(training: TrainingSettings, lengths: NDArray[np.int64], processes: int) -> StepPlan:
    """Count steps as transformers does: the last batches of an epoch make a step of their own.

    A step has batch_size × gradient_accumulation rows per process, with and without packing. Packed batches hold
    another number of rows, so the number of micro-batches per step is adjusted.

    Args:
        training: the settings.
        lengths: tokens of each sequence.
        processes: number of processes.

    Raises:
        LoratuneError: the warm-up is not shorter than the run.
    """
    rows, accumulation = len(lengths), training.gradient_accumulation
    batches, rows_per_batch = math.ceil(rows / training.batch_size), float(training.batch_size)
    largest = training.batch_size * int(lengths.max())
    if training.packing:
        packed = packed_batches(training, lengths)
        batches, largest = len(packed), max(int(lengths[members].sum()) for members in packed)
        rows_per_batch = rows / batches
        accumulation = max(1, round(training.batch_size * accumulation / rows_per_batch))
    steps_per_epoch = math.ceil(math.ceil(batches / processes) / accumulation)
    steps = training.max_steps or math.ceil(training.epochs * steps_per_epoch)
    if training.warmup >= 1 and training.warmup >= steps:
        raise LoratuneError(
            f"training.warmup {training.warmup:g} is not shorter than the run's {steps} steps; a fraction such as 0.05 "
            "always fits",
            Exit.USAGE,
        )
    rows_per_step = round(rows_per_batch * accumulation * processes)
    return StepPlan(batches, largest, accumulation, rows_per_step, steps_per_epoch, steps)
