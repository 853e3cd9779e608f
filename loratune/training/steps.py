"""How many batches an epoch has, and how many steps a run takes."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from loratune.data.packing import pack
from loratune.errors import Exit, LoratuneError
from loratune.recipe.sections import TrainingSettings


def tokens_per_batch(training: TrainingSettings, lengths: NDArray[np.int64]) -> int:
    """Tokens that a packed batch holds at most: as many as batch_size rows have on average, if the recipe says nothing.

    Packing then changes neither the rows of a step nor, by much, the number of steps.
    """
    wanted = training.tokens_per_batch or round(training.batch_size * float(lengths.mean()))
    return max(wanted, int(lengths.max()))


def packed_batches(training: TrainingSettings, lengths: NDArray[np.int64], seed: int = 0) -> list[list[int]]:
    """The sequences of each packed batch; which of those of one length come together is up to the seed."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    return [order[members].tolist() for members in pack(lengths[order], tokens_per_batch(training, lengths))]


def count_batches(training: TrainingSettings, lengths: NDArray[np.int64]) -> int:
    """Batches of an epoch, over all processes."""
    if training.packing:
        return len(packed_batches(training, lengths))
    return math.ceil(len(lengths) / training.batch_size)


def plan_steps(training: TrainingSettings, batches: int, processes: int) -> int:
    """Optimizer steps of a run, counted as transformers does: an epoch's last batches make a step of their own.

    Args:
        training: the settings.
        batches: of an epoch, over all processes.
        processes: that work together.

    Raises:
        LoratuneError: the warm-up is not shorter than the run.
    """
    steps_per_epoch = math.ceil(math.ceil(batches / processes) / training.gradient_accumulation)
    steps = training.steps or math.ceil(training.epochs * steps_per_epoch)
    if training.warmup >= 1 and training.warmup >= steps:
        raise LoratuneError(
            f"training.warmup {training.warmup:g} is not shorter than the run's {steps} steps; a fraction such as 0.05 "
            "always fits",
            Exit.USAGE,
        )
    return steps


def rows_per_step(training: TrainingSettings, rows: int, batches: int, processes: int) -> int:
    """Rows of an optimizer step, over all processes; packed, on average."""
    return max(1, round(rows / batches * training.gradient_accumulation * processes))
