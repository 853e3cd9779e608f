"""Measures whether a token sees those after it, which it would have to predict."""

from __future__ import annotations

from typing import Any

import torch

from loratune.errors import Exit, LoratuneError
from loratune.model.architecture.structure import causal_model
from loratune.protocols import AdaptedModel
from loratune.training.probes.passes import (
    LARGEST_SHARES,
    largest,
    last_states,
    packed,
    random_documents,
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
    other = [*own[:-1], (own[-1] + 1) % 2]
    with undisturbed(model):
        first, second = (last_states(model, _inputs(model, ids, is_packed))[0] for ids in (own, other))
    before, last = (largest(part) for part in ((first - second)[: LENGTH - 1], (first - second)[LENGTH - 1 : LENGTH]))
    if before > LARGEST_SHARES[model.dtype] * last:
        raise LoratuneError(
            f"{type(causal_model(model)).__name__}: a token sees those after it, so it cannot learn to predict them; "
            "this model is made to encode texts",
            Exit.MODEL,
        )


def _inputs(model: AdaptedModel, ids: list[int], is_packed: bool) -> dict[str, Any]:
    return packed(model, [ids]) if is_packed else {"input_ids": torch.tensor([ids], device=model.device)}
