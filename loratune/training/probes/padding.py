"""Measures whether padding leaves the states of a row as they are."""

from __future__ import annotations

from loratune.protocols import AdaptedModel
from loratune.training.probes.passes import (
    ALONE_SHARES,
    LARGEST_SHARES,
    largest,
    last_states,
    padded,
    random_documents,
    undisturbed,
)

LENGTHS = (5, 23)


def why_padding_matters(model: AdaptedModel) -> str:
    """Return how padding on the right changes the states of a row; empty if it does not.

    The padding's tokens must not matter. All shapes are the same then, so rounding is too. The row alone must give the
    same states, but for rounding.
    """
    short, long = random_documents(model, LENGTHS, seed=0)
    (unlike,) = random_documents(model, LENGTHS[:1], seed=1)
    with undisturbed(model):
        first, second = (last_states(model, padded(model, (short, long), token))[0, : len(short)] for token in (0, 1))
        alone, other = (last_states(model, padded(model, [row]))[0] for row in (short, unlike))
    control = largest(alone - other)
    if not largest(first - second) <= LARGEST_SHARES[model.dtype] * control:
        return "the padding's tokens change the states of a padded row"
    if not (first - alone).norm() <= ALONE_SHARES[model.dtype] * alone.norm():
        return "a padded row has other states than the row alone"
    return ""
