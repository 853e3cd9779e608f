"""Statistics of paired differences: the mean with a bootstrap interval, and the sign test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, lgamma, log
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Verdict = Literal["better", "worse", "no difference"]

CONFIDENCE = 0.95
RESAMPLES, FEWEST_RESAMPLES = 10_000, 1000
MOST_DRAWN = 1 << 27
"""Drawn rows of all resamples, which bounds the time: beyond 13,000 rows there are fewer resamples."""
SEED = 0
FEWEST_DIFFERING = 6
"""Rows that must differ before the sign test rejects chance at 5 %: if all do in one direction, 2 · 0.5⁶ = 0.03."""
AT_ONCE = 1 << 22
"""Drawn rows that are held at once."""


@dataclass(frozen=True)
class Comparison:
    """One measure of two models on the same rows."""

    rows: int
    baseline: float
    """Mean over the rows."""
    tuned: float
    difference: float
    """Mean of tuned − baseline."""
    low: float
    """Lower end of the 95 % bootstrap interval of the difference."""
    high: float
    better: int
    """Rows on which the tuned model is better by more than the margin."""
    worse: int
    margin: float
    """Differences up to it count as none."""
    p_value: float
    """Of the two-sided sign test on the rows that differ."""
    verdict: Verdict

    @property
    def equal(self) -> int:
        """Rows without a difference."""
        return self.rows - self.better - self.worse


def compare(
    baseline: Sequence[float], tuned: Sequence[float], margin: float = 0.0, is_loss: bool = False
) -> Comparison:
    """Compare two models on the same rows.

    The verdict needs three things: the interval of the mean excludes 0, the sign test rejects chance in the same
    direction, and the mean exceeds the margin. The interval alone is too narrow for few rows, and the sign test alone
    does not see how large differences are.

    Args:
        baseline: a value per row, at least one.
        tuned: the values of the same rows.
        margin: differences up to it count as none.
        is_loss: whether lower values are better.
    """
    differences = np.asarray(tuned, float) - np.asarray(baseline, float)
    low, high = bootstrap_interval(differences)
    gains = -differences if is_loss else differences
    better, worse = int((gains > margin).sum()), int((gains < -margin).sum())
    mean = float(differences.mean())
    p_value = sign_test(better, worse)
    is_shown = (low > 0 or high < 0) and p_value < 1 - CONFIDENCE and abs(mean) > margin
    gain = float(gains.mean())
    verdict: Verdict = "no difference"
    if is_shown and (gain > 0) == (better > worse):
        verdict = "better" if gain > 0 else "worse"
    return Comparison(
        rows=len(differences),
        baseline=float(np.mean(baseline)),
        tuned=float(np.mean(tuned)),
        difference=mean,
        low=low,
        high=high,
        better=better,
        worse=worse,
        margin=margin,
        p_value=p_value,
        verdict=verdict,
    )


def bootstrap_interval(differences: NDArray[np.float64]) -> tuple[float, float]:
    """Return the percentile interval of the mean over resampled rows; the same for the same values."""
    random, count = np.random.default_rng(SEED), len(differences)
    means = np.empty(min(RESAMPLES, max(FEWEST_RESAMPLES, MOST_DRAWN // count)))
    step = max(1, AT_ONCE // count)
    for start in range(0, len(means), step):
        drawn = random.integers(0, count, (min(step, len(means) - start), count))
        means[start : start + step] = differences[drawn].mean(axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)


def sign_test(better: int, worse: int) -> float:
    """Return the two-sided p-value of the sign test; for shares, this is McNemar's exact test."""
    count = better + worse
    tail = sum(
        exp(lgamma(count + 1) - lgamma(k + 1) - lgamma(count - k + 1) - count * log(2))
        for k in range(max(better, worse), count + 1)
    )
    return min(1.0, 2 * tail)
