"""Computes the steps of an epoch and of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from loratune.errors import Exit, LoratuneError, counted
from loratune.recipe.sections import TrainingSettings

FEW_STEPS = 10


@dataclass(frozen=True)
class StepPlan:
    """The numbers of rows and steps of a run."""

    rows_per_step: int
    """Rows of a step, over all processes; the last step of an epoch may have fewer."""
    steps_per_epoch: int
    steps: int
    """Steps of the whole run."""


def plan_steps(training: TrainingSettings, rows: int) -> StepPlan:
    """Count the steps; the last rows of an epoch make a step of their own.

    Args:
        training: the settings.
        rows: number of training sequences.

    Raises:
        LoratuneError: the warm-up is not shorter than the run.
    """
    steps_per_epoch = math.ceil(rows / training.batch_size)
    steps = training.max_steps or math.ceil(training.epochs * steps_per_epoch)
    if training.warmup >= 1 and training.warmup >= steps:
        raise LoratuneError(
            f"training.warmup {training.warmup:g} is not shorter than the run's {counted(steps, 'step')}; a fraction "
            "such as 0.05 always fits",
            Exit.USAGE,
        )
    return StepPlan(min(training.batch_size, rows), steps_per_epoch, steps)


def step_of(share: Fraction, steps: int) -> int | None:
    """Return the step that ends a share of a run, at least the first; None for the whole run."""
    step = math.ceil(share * steps)
    return step if step < steps else None


def advise_steps(training: TrainingSettings, plan: StepPlan) -> list[str]:
    """Return a sentence if a run has too few steps to learn much."""
    if training.max_steps or plan.steps >= FEW_STEPS:
        return []
    rows = counted(plan.rows_per_step, "row")
    return [f"the run has only {counted(plan.steps, 'step')} of {rows}: lower training.batch_size or raise epochs"]
