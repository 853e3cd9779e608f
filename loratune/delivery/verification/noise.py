"""Bounds of a proof from what rounding does to the model at hand.

Two correct computations in float32 differ by some rounding errors of their sums. Most models turn these into
differences of 1e-7 to 3e-6 of the largest logit. Some amplify them, such as those with a recurrent state. How much is
measured: base + adapter runs with noise on its updated weights, and is compared with itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace

from loratune.delivery.verification.parity import InState, compare_models, compare_pairs
from loratune.delivery.verification.routes import Routes
from loratune.model.weights.reference import inputs_unrounded
from loratune.model.weights.rounding import Rounding, rounded_as
from loratune.protocols import CausalModel
from loratune.runs.probe import ProbeRow
from loratune.runs.verification import Bounds, Parity

State = Callable[[], AbstractContextManager[None]]

RUNS = 3
"""With noise of different seeds: the largest difference of two logits varies between runs by a factor of some."""
ALLOWED = 3
"""Times the largest effect of noise."""


def noise_of(
    reference: CausalModel, merged: CausalModel, roundings: Mapping[str, Rounding], rows: Sequence[ProbeRow]
) -> tuple[Parity, ...]:
    """Compare base + adapter with itself under noise of one unit in the last place of float32, for each run.

    Args:
        reference: base + adapter.
        merged: the merged model, whose routes the runs follow.
        roundings: how the merged weights were rounded; the noise is on these.
        rows: rows with at least one label in total.
    """
    routes, states = Routes(), [roundings, *(_noisy(roundings, run) for run in range(1, RUNS + 1))]
    rounded = [
        InState(reference, all_of(functools.partial(rounded_as, reference, state), routes.follower()))
        for state in states
    ]
    pairs = [(1, 1 + run) for run in range(1, RUNS + 1)]
    return tuple(compare_pairs([InState(merged, routes.noted), *rounded], pairs, rows))


def input_noise_of(reference: CausalModel, rows: Sequence[ProbeRow]) -> tuple[Parity, ...]:
    """Compare base + adapter with itself without LLM.int8's rounding of the inputs of layers."""
    exact = InState(reference, functools.partial(inputs_unrounded, reference))
    return tuple(compare_models(reference, [exact], rows))


def bounds_of_noise(noise: Sequence[Parity], usual: Bounds) -> Bounds:
    """Return what noise may explain: a multiple of its largest effect, but at least the usual bounds."""
    difference = max(one.largest_difference / max(1.0, one.largest_logit) for one in noise)
    return Bounds(
        max(usual.difference, ALLOWED * difference),
        max(usual.mean_kl, ALLOWED * max(one.mean_kl for one in noise)),
        max(usual.clear_disagreement, ALLOWED * max(one.clear_disagreement for one in noise)),
    )


def all_of(*states: State) -> State:
    """Return a context that is all of the given ones."""

    @contextmanager
    def entered() -> Iterator[None]:
        with ExitStack() as stack:
            for state in states:
                stack.enter_context(state())
            yield

    return entered


def _noisy(roundings: Mapping[str, Rounding], run: int) -> dict[str, Rounding]:
    return {name: replace(one, seed=(run, place)) for place, (name, one) in enumerate(roundings.items())}
