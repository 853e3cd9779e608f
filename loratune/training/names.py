"""Compares what a recipe names of a model with the modules that its config makes, before any weight is read."""

from __future__ import annotations

from loratune.errors import LoratuneError, refusal
from loratune.model.adapter.attach import check_names
from loratune.model.adapter.own_weights import resolve_weights
from loratune.model.files import find_config
from loratune.model.hardware import Hardware
from loratune.model.outline import outline
from loratune.protocols import CausalModel
from loratune.recipe.sections import Recipe


def refused_names(recipe: Recipe, hardware: Hardware) -> LoratuneError | None:
    """Return what is wrong with the names of modules and layers in a recipe; None if nothing is, or it is not known.

    A base that cannot be found or made without weights is told of where it is loaded, and the names with it.
    """
    settings = recipe.model.model_copy(update={"quantization": "none"})  # which renames nothing, and takes longer
    try:
        model = outline(settings, find_config(recipe.model)[0], hardware)
    except Exception:
        return None
    return refusal(lambda: _check(model, recipe))


def _check(model: CausalModel, recipe: Recipe) -> None:
    if recipe.trains_base:
        resolve_weights(model, recipe, dict(model.named_parameters(remove_duplicate=False)))
    else:
        check_names(model, recipe.lora)
