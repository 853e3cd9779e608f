"""What a sweep costs: hours from the seconds per step that its own trials have taken, and the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loratune.sweep.plan import Plan, Trial, Work


@dataclass(frozen=True)
class Price:
    """What was measured so far."""

    seconds_per_step: float
    seconds_per_start: float
    """What a process takes beside its steps."""

    def of(self, work: Work) -> float:
        """Return the seconds that a trial takes to train up to a rung."""
        done = work.trial.newest.step if work.trial.newest else 0
        steps = work.trial.newest.steps if work.trial.newest else work.trial.steps
        return self.seconds_per_start + max(0.0, float(work.share * steps) - done) * self.seconds_per_step

    def left(self, plan: Plan, trials: Sequence[Trial], workers: int) -> float:
        """Return the seconds until the end of a sweep, if no trial fails."""
        starts, steps = plan.left(trials)
        return (starts * self.seconds_per_start + steps * self.seconds_per_step) / workers


def measured(trials: Sequence[Trial]) -> Price | None:
    """Return the price by all results so far; None before the first."""
    steps, seconds, starts, beside = 0, 0.0, 0, 0.0
    for trial in trials:
        before_step, before_seconds = 0, 0.0
        for _, outcome in sorted(trial.outcomes.items()):
            took = outcome.seconds - before_seconds
            steps, seconds = steps + outcome.step - before_step, seconds + took
            if outcome.process_seconds:
                starts, beside = starts + 1, beside + max(0.0, outcome.process_seconds - took)
            before_step, before_seconds = outcome.step, outcome.seconds
    return Price(seconds / steps, beside / max(starts, 1)) if steps else None


def duration(seconds: float) -> str:
    """Return a duration for a line: 9 s, 4 min, 1.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
