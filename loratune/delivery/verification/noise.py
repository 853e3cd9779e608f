"""Bounds of a proof from what rounding does to the model at hand.

Two correct computations in float32 differ by some rounding errors of their sums. Most models turn these into
differences of 1e-7 to 3e-6 of the largest logit. Some amplify them, such as those with a recurrent state. How much is
measured: base + adapter runs with noise on its updated weights and with their sums in another order, and is compared
with itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from loratune.delivery.verification.parity import InState, compare_pairs
from loratune.delivery.verification.proof import EXACT
from loratune.delivery.verification.routes import Routes
from loratune.model.weights.dequantised import inputs_unrounded
from loratune.model.weights.rounding import Rounding, rounded_as
from loratune.protocols import CausalModel
from loratune.runs.probe import ProbeRow
from loratune.runs.verification import Bounds, Parity

RUNS = 3
"""With noise of different seeds: the largest difference of two logits varies between runs by a factor of some."""
ALLOWED = 3
"""Times the largest effect of noise."""


def noise_of(
    reference: CausalModel, merged: CausalModel, roundings: Mapping[str, Rounding], rows: Sequence[ProbeRow]
) -> tuple[Parity, ...]:
    """Compare base + adapter with itself under float32's noise, see `Rounding.seed`, for each run.

    Args:
        reference: base + adapter.
        merged: the merged model, whose routes the runs follow.
        roundings: how the merged weights were rounded; the noise is on these.
        rows: rows with at least one label in total.
    """
    routes = Routes()
    states = [roundings, *(_noisy(roundings, run) for run in range(1, RUNS + 1))]
    models = [InState(merged, routes.noted), *(in_rounded_state(reference, state, routes) for state in states)]
    return tuple(compare_pairs(models, [(1, 1 + run) for run in range(1, RUNS + 1)], rows))


def in_rounded_state(reference: CausalModel, roundings: Mapping[str, Rounding], routes: Routes) -> InState:
    """Return base + adapter with the rounding errors of merged weights and no others, on the routes of another model.

    Args:
        reference: base + adapter.
        roundings: how the merged weights were rounded.
        routes: of the merged model.
    """
    follower = routes.follower()

    @contextmanager
    def state() -> Iterator[None]:
        with inputs_unrounded(reference), rounded_as(reference, roundings), follower():
            yield

    return InState(reference, state)


def bounds_of_noise(noise: Sequence[Parity]) -> Bounds:
    """Return what noise may explain: a multiple of its largest effect, but at least what float32 makes of any model."""
    difference = max(one.relative_difference for one in noise)
    return Bounds(
        max(EXACT.difference, ALLOWED * difference),
        max(EXACT.mean_kl, ALLOWED * max(one.mean_kl for one in noise)),
        max(EXACT.clear_disagreement, ALLOWED * max(one.clear_disagreement for one in noise)),
    )


def _noisy(roundings: Mapping[str, Rounding], run: int) -> dict[str, Rounding]:
    return {name: replace(one, seed=(run, place)) for place, (name, one) in enumerate(roundings.items())}
