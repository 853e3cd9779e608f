"""Runs all checks of a model before the first step, and decides how its rows are put into passes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from loratune.errors import counted
from loratune.model.architecture.structure import causal_model
from loratune.model.kernels.attention_choice import AttentionChoice
from loratune.model.kernels.linear_cross_entropy import add_labelled_loss
from loratune.model.weights.dequantised import modules_with
from loratune.protocols import AdaptedModel, CausalModel
from loratune.recipe.sections import Recipe
from loratune.runs.model_check import ModelCheck
from loratune.training.probes.causality import check_causality
from loratune.training.probes.gradients import check_gradients
from loratune.training.probes.isolation import Packing, choose_packing
from loratune.training.probes.padding import why_padding_matters
from loratune.training.probes.passes import packed, padded, random_documents, undisturbed
from loratune.training.probes.saved_adapter import check_saved_adapter

Found = TypeVar("Found")
LENGTHS = (3, 8)
"""Tokens of the rows of a small pass."""


@dataclass(frozen=True)
class CheckedModel:
    """What was measured on a model, and how its rows are put into passes."""

    attention: AttentionChoice
    is_packed: bool
    """Whether rows are packed, as the recipe asks and the model allows."""
    is_masked: bool
    """Whether the attention of packed rows gets a mask of the whole row."""
    is_single: bool
    """Whether each row makes a pass of its own, since the model allows no padding either."""
    checks: tuple[ModelCheck, ...]
    warnings: tuple[str, ...]


def check_model(
    model: AdaptedModel, plain: CausalModel | None, attention: AttentionChoice, loaded_attention: str, recipe: Recipe
) -> CheckedModel:
    """Measure on a model what its training relies on, and add the labelled loss to it.

    Args:
        model: the base with a fresh adapter, on its device.
        plain: the base as PEFT alone would use it, see `with_same_weights`; it is changed. None leaves the check of
            the saved adapter out.
        attention: chosen for the model.
        loaded_attention: name of the attention that the model was loaded with.
        recipe: the run's recipe.

    Raises:
        LoratuneError: the model cannot be trained as the recipe says.
    """
    packing, warnings, checks = Packing(attention, False, False, ""), list[str](), list[ModelCheck]()
    if recipe.training.packing:
        packing, check = _timed("documents", lambda: choose_packing(model, attention, loaded_attention), _reason_of)
        checks.append(check)
    if recipe.training.packing and not packing.is_packed:
        warnings.append(f"training.packing: {packing.reason}")
    problem = ""
    if not packing.is_packed:
        problem, check = _timed("padding", lambda: why_padding_matters(model), _padding_text)
        checks.append(check)
    _, order = _timed("order", lambda: check_causality(model, packing.is_packed), lambda _: _order_text(model))
    if problem:
        warnings.append(f"each row is a pass of its own, which is slower: {problem}")
    # With the attention that is settled now, because others may not compute the model's scores.
    _, logits = _timed("logits", lambda: _with_loss(model), _logits_text)
    rows = random_documents(model, LENGTHS, seed=0)
    inputs = packed(model, rows) if packing.is_packed else padded(model, rows)
    _, gradients = _timed("gradients", lambda: check_gradients(model, recipe, inputs), _gradients_text)
    checks += [order, logits, gradients]
    if plain is not None:
        unchecked, saved = _timed("saved adapter", lambda: check_saved_adapter(model, plain), _saved_text)
        warnings += [_saved_text(unchecked)] if unchecked else []
        checks.append(saved)
    return CheckedModel(
        packing.attention, packing.is_packed, packing.is_masked, bool(problem), tuple(checks), tuple(warnings)
    )


def _timed(name: str, measure: Callable[[], Found], told: Callable[[Found], str]) -> tuple[Found, ModelCheck]:
    start = time.perf_counter()
    found = measure()
    return found, ModelCheck(name, told(found), round(time.perf_counter() - start, 3))


def _with_loss(model: AdaptedModel) -> Any:
    with undisturbed(model):
        return add_labelled_loss(causal_model(model))


def _logits_text(head: Any) -> str:
    if isinstance(head, nn.Module):
        return "logits come from the head alone"
    return "logits come from the model's own forward, which scales or caps them"


def _reason_of(packing: Packing) -> str:
    return packing.reason


def _padding_text(problem: str) -> str:
    return problem or "padding changes nothing"


def _order_text(model: AdaptedModel) -> str:
    text = "no token sees a later one"
    return f"{text}, but for how LLM.int8 rounds" if modules_with(model, "Int8Params") else text


def _gradients_text(weights: int) -> str:
    return f"gradients reach all {counted(weights, 'trained weight')} and no other"


def _saved_text(unchecked: str) -> str:
    if unchecked:
        return f"it is not checked whether PEFT gives the same states from the saved adapter: {unchecked}"
    return "PEFT gives the same states from the saved adapter"
