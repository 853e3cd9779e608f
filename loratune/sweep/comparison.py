"""Compares trials: which is best, and whether others differ from it by more than seeds do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev, variance

from loratune.sweep.plan import Trial, firsts
from loratune.sweep.report import Noise, Standing
from loratune.sweep.space import Choices, Space, described, short_names, text_of

QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145, 2.131, 2.12,
    2.11, 2.101, 2.093, 2.086, 2.08, 2.074, 2.069, 2.064, 2.06, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t for 95 %, two-sided, by degrees of freedom from 1."""
MANY = 1.96
"""For more degrees of freedom than that."""


def standings(trials: Sequence[Trial], rung: int) -> list[Standing]:
    """Return the trials that have been trained whole, with all their seeds, the best first.

    Those that were repeated come first, because one loss alone is lower by chance where it was chosen for being low.
    """
    found = []
    for trial in firsts(trials):
        if rung in trial.outcomes:
            losses = _losses(trial, trials, rung)
            deviation = stdev(losses) if len(losses) > 1 else None
            found.append(Standing(trial.name, trial.settings, fmean(losses), len(losses), deviation))
    return sorted(found, key=lambda one: (one.seeds == 1, one.loss))


def noise_of(trials: Sequence[Trial], rung: int) -> Noise | None:
    """Return how much losses differ by the seed; None where nothing was repeated."""
    groups = [losses for trial in firsts(trials) if len(losses := _losses(trial, trials, rung)) > 1]
    degrees = sum(len(losses) - 1 for losses in groups)
    if not degrees:
        return None
    pooled = sum(variance(losses) * (len(losses) - 1) for losses in groups) / degrees
    deviation = math.sqrt(pooled)
    return Noise(deviation, degrees, _quantile(degrees) * deviation * math.sqrt(2))


def differ(one: Standing, other: Standing, noise: Noise) -> bool:
    """Return whether two means differ by more than seeds do, in 95 of 100 cases."""
    spread = _quantile(noise.degrees) * noise.deviation * math.sqrt(1 / one.seeds + 1 / other.seeds)
    return abs(one.loss - other.loss) > spread


def sentence_of(trials: Sequence[Trial], rung: int, space: Space) -> str:
    """Return what a sweep has found, in one sentence."""
    found, noise = standings(trials, rung), noise_of(trials, rung)
    if not found:
        return "no trial has been trained to its end"
    best, *others = found
    spread = f" ± {best.deviation:.4f} over {best.seeds} seeds" if best.deviation is not None else ""
    parts = [f"{described(best.settings)} is best ({best.loss:.4f}{spread})"]
    if others:
        parts += _against(best, others, noise)
    if len(space) > 1:
        parts += _worths(trials, best, space, noise)
    return "; ".join(parts)


def _losses(trial: Trial, trials: Sequence[Trial], rung: int) -> list[float]:
    """Return the losses at a rung of a trial and its repetitions."""
    alike = [one for one in trials if one is trial or one.repeats == trial.number]
    return [one.outcomes[rung].loss for one in alike if rung in one.outcomes]


def _quantile(degrees: int) -> float:
    return QUANTILES[degrees - 1] if degrees <= len(QUANTILES) else MANY


def _against(best: Standing, others: Sequence[Standing], noise: Noise | None) -> list[str]:
    """Return what is said of the next best trial, and of those that chance may have put behind."""
    told = f"{_difference(best, others[0])} is {_percent(best.loss, others[0].loss)} worse"
    if noise is None:
        return [f"{told}, and how much seeds differ is not known"]
    alike = [_difference(best, one) for one in others if not differ(best, one, noise)]
    apart = [f"{told}, more than seeds differ"] if differ(best, others[0], noise) else []
    named = " and ".join([", ".join(alike[:-1])] * (len(alike) > 1) + alike[-1:])
    return apart + ([f"{named} {'is' if len(alike) == 1 else 'are'} within seed noise"] if alike else [])


def _difference(best: Standing, other: Standing) -> str:
    """Return what another trial has that the best one has not."""
    different = {name: value for name, value in other.settings.items() if (name, value) not in best.settings.items()}
    return described(different or other.settings, " with ")


def _worths(trials: Sequence[Trial], best: Standing, space: Space, noise: Noise | None) -> list[str]:
    """Return for each setting how much the best value gains over the next best one, other settings at their best."""
    worths, names = list[str](), short_names(list(space))
    last = max(rung for trial in trials for rung in trial.outcomes)
    for setting, axis in space.items():
        if not isinstance(axis, Choices) or not (pair := _best_with_and_without(trials, setting, best)):
            continue
        mine, other, rung = pair
        told = f"{names[setting]} {text_of(mine.settings[setting])} over {text_of(other.settings[setting])} is worth "
        told += _percent(mine.loss, other.loss)
        if rung < last:
            step = next(trial.outcomes[rung].step for trial in trials if trial.name == mine.name)
            told += f" at step {step}"
        elif noise and not differ(mine, other, noise):
            told += ", within seed noise"
        worths.append(told)
    return worths


def _best_with_and_without(
    trials: Sequence[Trial], setting: str, best: Standing
) -> tuple[Standing, Standing, int] | None:
    """Return the best trial with a value, the best with another one, and the highest rung that both have reached."""
    if setting not in best.settings:
        return None
    for rung in sorted({rung for trial in trials for rung in trial.outcomes}, reverse=True):
        there = [one for one in standings(trials, rung) if setting in one.settings]
        mine = [one for one in there if one.settings[setting] == best.settings[setting]]
        others = [one for one in there if one.settings[setting] != best.settings[setting]]
        if mine and others:
            return mine[0], others[0], rung
    return None


def _percent(low: float, high: float) -> str:
    share = (high - low) / low if low else math.inf
    return f"{share:.1%}" if abs(share) < 1 else f"{share:.0%}"
