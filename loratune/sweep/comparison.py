"""Compares trials: which is best, and whether others differ from it by more than seeds do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance

from loratune.choices import BestBy, BestOf
from loratune.errors import agreeing
from loratune.sweep.plan import Trial, firsts, judged, order
from loratune.sweep.report import NATS, Noise, Standing
from loratune.sweep.space import Choices, Space, described, short_names, text_of

QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145, 2.131, 2.12,
    2.11, 2.101, 2.093, 2.086, 2.08, 2.074, 2.069, 2.064, 2.06, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t for 95 %, two-sided, by degrees of freedom from 1."""
MANY = 1.96
"""For more degrees of freedom than that."""


def standings(trials: Sequence[Trial], rung: int, best_by: BestBy = "auto") -> list[Standing]:
    """Return the trials that have been trained whole, with all their seeds, the best first.

    Those that were repeated come first, because one loss alone is lower by chance where it was chosen for being low.
    """
    found = []
    for trial in firsts(trials):
        if losses := _values(trial, trials, rung, "loss"):
            exact = _values(trial, trials, rung, "exact")
            about = {"exact": fmean(exact), "exact_deviation": _deviation(exact)} if exact else {}
            found.append(Standing(trial.name, trial.settings, fmean(losses), len(losses), _deviation(losses), **about))
    return sorted(found, key=lambda one: (one.seeds == 1, *order(one, best_by)))


def noise_of(trials: Sequence[Trial], rung: int, of: BestOf = "loss") -> Noise | None:
    """Return how much losses, or shares of exact answers, differ by the seed; None where nothing was repeated."""
    groups = [values for trial in firsts(trials) if len(values := _values(trial, trials, rung, of)) > 1]
    degrees = sum(len(values) - 1 for values in groups)
    if not degrees:
        return None
    pooled = sum(variance(values) * (len(values) - 1) for values in groups) / degrees
    deviation = math.sqrt(pooled)
    return Noise(deviation, degrees, _quantile(degrees) * deviation * math.sqrt(2), of)


def differ(one: Standing, other: Standing, noise: Noise) -> bool:
    """Return whether two means differ by more than seeds do, in 95 of 100 cases."""
    spread = _quantile(noise.degrees) * noise.deviation * math.sqrt(1 / one.seeds + 1 / other.seeds)
    return bool(abs(getattr(one, noise.of) - getattr(other, noise.of)) > spread)


@dataclass(frozen=True)
class Findings:
    """What a sweep has found, for its sentence."""

    trials: Sequence[Trial]
    rung: int
    """Of whole runs."""
    space: Space
    best_by: BestBy = "auto"
    unit: str = NATS

    def sentence(self) -> str:
        """Return it in one sentence."""
        found = standings(self.trials, self.rung, self.best_by)
        if not found:
            return "no trial has been trained to its end"
        best, *others = found
        parts = [f"{described(best.settings)} is best ({self._figures(best)})"]
        if others:
            parts += self._against(best, others)
        if len(self.space) > 1:
            parts += self._worths(best)
        return "; ".join(parts)

    def _figures(self, best: Standing) -> str:
        spread = f" ± {best.deviation:.4f}" if best.deviation is not None else ""
        loss = f"{best.loss:.4f}{spread}{'' if self.unit == NATS else f' {self.unit}'}"
        over = f" over {best.seeds} seeds" if best.seeds > 1 else ""
        if judged(best, self.best_by) == "loss":
            return loss + over
        spread = f" ± {best.exact_deviation:.1%}" if best.exact_deviation is not None else ""
        return f"{best.exact:.1%}{spread} of the answers exact, loss {loss}{over}"

    def _decides(self, one: Standing, other: Standing) -> BestOf:
        """Return what tells two trials apart: the loss where as many answers are exact, or hardly any."""
        is_counted = one.exact is not None and other.exact is not None
        return "exact" if is_counted and order(one, self.best_by)[0] != order(other, self.best_by)[0] else "loss"

    def _are_alike(self, one: Standing, other: Standing) -> bool | None:
        """Return whether seeds differ by as much; None if that is not known."""
        noise = noise_of(self.trials, self.rung, self._decides(one, other))
        return None if noise is None else not differ(one, other, noise)

    def _gap(self, one: Standing, other: Standing) -> str:
        """Return by how much a trial is better than another one."""
        if self._decides(one, other) == "exact":
            return f"{100 * ((one.exact or 0) - (other.exact or 0)):.1f} points of exact answers"
        return _percent(one.loss, other.loss)

    def _against(self, best: Standing, others: Sequence[Standing]) -> list[str]:
        """Return what is said of the next best trial, and of those that chance may have put behind."""
        told = f"{_difference(best, others[0])} is {self._gap(best, others[0])} worse"
        if self._are_alike(best, others[0]) is None:
            return [f"{told}, and how much seeds differ is not known"]
        alike = [_difference(best, one) for one in others if self._are_alike(best, one)]
        apart = [] if self._are_alike(best, others[0]) else [f"{told}, more than seeds differ"]
        named = " and ".join([", ".join(alike[:-1])] * (len(alike) > 1) + alike[-1:])
        return apart + ([f"{named} {agreeing(len(alike), 'are within seed noise')}"] if alike else [])

    def _worths(self, best: Standing) -> list[str]:
        """Return for each setting how much the best value gains over the next best, other settings at their best."""
        worths, names = list[str](), short_names(list(self.space))
        last = max(rung for trial in self.trials for rung in trial.outcomes)
        for setting, axis in self.space.items():
            if not isinstance(axis, Choices) or not (pair := self._best_with_and_without(setting, best)):
                continue
            mine, other, rung = pair
            told = f"{names[setting]} {text_of(mine.settings[setting])} over {text_of(other.settings[setting])} is "
            told += f"worth {self._gap(mine, other)}"
            if rung < last:
                step = next(trial.outcomes[rung].step for trial in self.trials if trial.name == mine.name)
                told += f" at step {step}"
            elif self._are_alike(mine, other):
                told += ", within seed noise"
            worths.append(told)
        return worths

    def _best_with_and_without(self, setting: str, best: Standing) -> tuple[Standing, Standing, int] | None:
        """Return the best trial with a value, the best with another one, and the highest rung that both reached."""
        if setting not in best.settings:
            return None
        for rung in sorted({rung for trial in self.trials for rung in trial.outcomes}, reverse=True):
            there = [one for one in standings(self.trials, rung, self.best_by) if setting in one.settings]
            mine = [one for one in there if one.settings[setting] == best.settings[setting]]
            others = [one for one in there if one.settings[setting] != best.settings[setting]]
            if mine and others:
                return mine[0], others[0], rung
        return None


def _values(trial: Trial, trials: Sequence[Trial], rung: int, of: BestOf) -> list[float]:
    """Return the figures at a rung of a trial and its repetitions; none where one of them lacks it."""
    alike = [one for one in trials if one is trial or one.repeats == trial.number]
    values = [getattr(one.outcomes[rung], of) for one in alike if rung in one.outcomes]
    return [] if None in values or rung not in trial.outcomes else values


def _deviation(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def _quantile(degrees: int) -> float:
    return QUANTILES[degrees - 1] if degrees <= len(QUANTILES) else MANY


def _difference(best: Standing, other: Standing) -> str:
    """Return what another trial has that the best one has not."""
    different = {name: value for name, value in other.settings.items() if (name, value) not in best.settings.items()}
    return described(different or other.settings, " with ")


def _percent(low: float, high: float) -> str:
    share = (high - low) / low if low else math.inf
    return f"{share:.1%}" if abs(share) < 1 else f"{share:.0%}"
