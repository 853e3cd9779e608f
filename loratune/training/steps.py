"""How many steps a run takes."""

from __future__ import annotations

import math

from loratune.errors import Exit, LoratuneError
from loratune.recipe.sections import TrainingSettings


def rows_per_step(training: TrainingSettings, processes: int) -> int:
    """Rows of one optimizer step, over all processes."""
    return training.batch_size * training.gradient_accumulation * processes


def plan_steps(training: TrainingSettings, rows: int, processes: int) -> int:
    """Optimizer steps of a run, counted as transformers does: an epoch's last batches make a step of their own.

    Raises:
        LoratuneError: the warm-up is not shorter than the run.
    """
    batches = math.ceil(rows / (training.batch_size * processes))
    steps_per_epoch = math.ceil(batches / training.gradient_accumulation)
    steps = training.steps or math.ceil(training.epochs * steps_per_epoch)
    if training.warmup >= 1 and training.warmup >= steps:
        raise LoratuneError(
            f"training.warmup {training.warmup:g} is not shorter than the run's {steps} steps; a fraction such as 0.05 "
            "always fits",
            Exit.USAGE,
        )
    return steps
