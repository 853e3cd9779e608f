"""Which trial is trained next, and how far: a function of the results alone, so it depends on no order of events.

Trials are halved in rungs. All train to the first rung, and when each has a result there, the best third trains on to
the next one. A trial that waits there goes on from its checkpoint, so nothing is computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Protocol

from loratune.choices import BestBy, BestOf
from loratune.sweep.space import Settings
from loratune.training.checkpoints.best import Validation, judged_by, rank

KEPT = 3
"""One in this many trials goes on at a rung; each rung is this many times as long as the one before."""
REPEATED = 2
"""How many of the best are trained with other seeds."""


class Result(Protocol):
    """A validation loss and a share of exact answers."""

    @property
    def loss(self) -> float: ...

    @property
    def exact(self) -> float | None: ...


@dataclass(frozen=True)
class Outcome:
    """What a trial has reached at a rung."""

    loss: float
    """Validation loss in the sweep's unit; at the last rung that of the adapter that was kept."""
    step: int
    steps: int
    """Of the whole run."""
    seconds: float
    """Of training, since the run's first step."""
    process_seconds: float
    """Of the process that has reached it, with its start; 0 where that process was ended before it could say so."""
    peak_memory_bytes: int | None = None
    exact: float | None = None
    """Share of the validation answers that are exact."""
    forgetting: Mapping[str, float] | None = None
    """Language → rise of the loss of general text, in the sweep's unit; at the last rung only."""


@dataclass(frozen=True)
class Failure:
    """How a trial ended before it had a result."""

    code: int
    """Exit code of its process; negative for a signal."""
    message: str


@dataclass(frozen=True)
class Trial:
    """Settings of a sweep, and what has come of them."""

    number: int
    name: str
    """Of its run folder."""
    settings: Settings
    steps: int
    """Of its whole run, as planned."""
    repeats: int | None = None
    """Number of the trial whose settings it repeats with another seed."""
    seed: int | None = None
    """That seed."""
    outcomes: Mapping[int, Outcome] = field(default_factory=dict)
    """Rung → result."""
    failure: Failure | None = None

    def is_settled(self, rung: int) -> bool:
        """Return whether nothing is left to train up to a rung."""
        return rung in self.outcomes or self.failure is not None

    @property
    def newest(self) -> Outcome | None:
        """The result at the highest rung."""
        return self.outcomes[max(self.outcomes)] if self.outcomes else None


@dataclass(frozen=True)
class Work:
    """A trial that has to train up to a rung."""

    trial: Trial
    rung: int
    share: Fraction
    """Of the trial's steps."""


@dataclass(frozen=True)
class Plan:
    """How a sweep goes through its trials."""

    count: int
    """Number of trials, without repetitions."""
    shares: tuple[Fraction, ...]
    """Of a run's steps, one for each rung; the last is 1."""
    seeds: int
    """With which the best are trained, with the recipe's own."""
    seed: int
    """The recipe's own."""
    best_by: BestBy = "auto"
    """Which of two results is better, as for the validations of a run."""

    @property
    def last(self) -> int:
        """The rung of whole runs."""
        return len(self.shares) - 1

    def sizes(self) -> list[int]:
        """Return how many trials train to each rung, if none fails."""
        sizes = [self.count]
        for _ in self.shares[1:]:
            sizes.append(_kept(sizes[-1]))
        return sizes

    def levels(self, trials: Sequence[Trial]) -> list[list[Trial]]:
        """Return the trials that may train to each rung; rungs that are not decided yet are left out."""
        levels = [firsts(trials)]
        for rung in range(self.last):
            here = levels[-1]
            is_decided = (rung or len(here) == self.count) and all(trial.is_settled(rung) for trial in here)
            if not is_decided:
                break
            levels.append(ranked(here, rung, self.best_by)[: _kept(len(here))])
        return levels

    def best(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return the trials that are to be repeated with other seeds; none while whole runs are left."""
        levels = self.levels(trials)
        is_known = len(firsts(trials)) == self.count and len(levels) == len(self.shares)
        if not is_known or not all(trial.is_settled(self.last) for trial in levels[-1]):
            return []
        return ranked(levels[-1], self.last, self.best_by)[:REPEATED]

    def repetitions(self, trials: Sequence[Trial]) -> list[tuple[Trial, int]]:
        """Return trial and seed of each repetition that does not exist yet."""
        known = {(trial.repeats, trial.seed) for trial in trials}
        seeds = [(self.seed + more) % 2**32 for more in range(1, self.seeds)]
        return [(trial, seed) for seed in seeds for trial in self.best(trials) if (trial.number, seed) not in known]

    def work(self, trials: Sequence[Trial]) -> list[Work]:
        """Return what can be trained now: earlier rungs first, then repetitions."""
        work = [
            Work(trial, rung, self.shares[rung])
            for rung, level in enumerate(self.levels(trials))
            for trial in level
            if not trial.is_settled(rung)
        ]
        repeated = [trial for trial in trials if trial.repeats is not None and not trial.is_settled(self.last)]
        return work or [Work(trial, self.last, self.shares[self.last]) for trial in repeated]

    def is_done(self, trials: Sequence[Trial]) -> bool:
        """Return whether nothing is left to train."""
        return len(firsts(trials)) == self.count and not self.work(trials) and not self.repetitions(trials)

    def left(self, trials: Sequence[Trial]) -> tuple[int, float]:
        """Return how many processes are still to start, and how many steps they train, if no trial fails."""
        mine = firsts(trials)
        steps = sum(trial.steps for trial in mine) / max(len(mine), 1)
        starts, shares = 0, (Fraction(0), *self.shares)
        trained = 0.0
        for rung, size in enumerate(self.sizes()):
            count = max(0, size - sum(trial.is_settled(rung) for trial in mine))
            starts, trained = starts + count, trained + count * float(shares[rung + 1] - shares[rung]) * steps
        repetitions = min(REPEATED, self.sizes()[-1]) * (self.seeds - 1)
        count = repetitions - sum(trial.repeats is not None and trial.is_settled(self.last) for trial in trials)
        return starts + max(0, count), trained + max(0, count) * steps


def shares_of(count: int, is_halved: bool) -> tuple[Fraction, ...]:
    """Return the share of a run's steps at each rung: as many rungs as leave three trials or fewer for whole runs."""
    rungs = 1
    while is_halved and count > KEPT:
        count, rungs = _kept(count), rungs + 1
    return tuple(Fraction(1, KEPT**rung) for rung in reversed(range(rungs)))


def firsts(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that repeat no other one."""
    return [trial for trial in trials if trial.repeats is None]


def judged(result: Result, best_by: BestBy) -> BestOf:
    """Return what says how good a result is."""
    return judged_by(Validation(0, result.loss, result.exact), best_by)


def order(result: Result, best_by: BestBy) -> tuple[float, float]:
    """Return what is lower for a better result, by the rule that chooses among the validations of a run."""
    exact, loss = rank(Validation(0, result.loss, result.exact), best_by)
    return -exact, -loss


def ranked(trials: Sequence[Trial], rung: int, best_by: BestBy) -> list[Trial]:
    """Return the trials with a result at a rung, the best first."""
    there = [trial for trial in trials if rung in trial.outcomes]
    return sorted(there, key=lambda trial: (*order(trial.outcomes[rung], best_by), trial.number))


def _kept(count: int) -> int:
    return math.ceil(count / KEPT)
