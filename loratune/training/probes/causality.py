"""Measures whether a token sees those after it, which it would have to predict."""

from __future__ import annotations

from loratune.errors import Exit, LoratuneError
from loratune.model.architecture.structure import causal_model
from loratune.protocols import AdaptedModel
from loratune.training.probes.passes import (
    LARGEST_SHARES,
    largest,
    last_states,
    packed,
    random_documents,
    single,
    undisturbed,
)

LENGTH = 8


def check_causality(model: AdaptedModel, is_packed: bool) -> None:
    """Check that another last token changes no state before it, but its own.

    Args:
        model: the model with the attention that it trains with.
        is_packed: whether rows are packed.

    Raises:
        LoratuneError: it changes earlier ones, as in a model that encodes texts.
    """
    (own,) = random_documents(model, [LENGTH], seed=0)
    other = [*own[:-1], 0 if own[-1] else 1]
    layout = packed if is_packed else single
    with undisturbed(model):
        first, second = (last_states(model, layout(model, [ids]))[0, :LENGTH] for ids in (own, other))
    earlier, last = largest((first - second)[:-1]), largest((first - second)[-1])
    if not earlier <= LARGEST_SHARES[model.dtype] * last:
        raise LoratuneError(
            f"{type(causal_model(model)).__name__}: a token sees those after it, so it cannot learn to predict them; "
            "this model is made to encode texts",
            Exit.MODEL,
        )
