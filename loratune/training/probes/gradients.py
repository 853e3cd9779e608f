"""Measures which weights get a gradient."""

from __future__ import annotations

from typing import Any

from loratune.errors import Exit, LoratuneError, bullet_list, counted
from loratune.model.adapter.attach import is_adapter_weight
from loratune.model.adapter.own_weights import trained_weights
from loratune.protocols import AdaptedModel
from loratune.recipe.sections import Recipe
from loratune.training.probes.passes import undisturbed

SHOWN = 8


def check_gradients(model: AdaptedModel, recipe: Recipe, inputs: dict[str, Any]) -> int:
    """Check with a small pass that every weight to be trained gets a gradient, and that no other weight would train.

    Args:
        model: the model with its labelled loss, and without gradients.
        recipe: says what is trained.
        inputs: a pass with labels.

    Returns:
        The number of weights, without trained biases of an adapter's base.

    Raises:
        LoratuneError: names the weights.
    """
    named = dict(model.named_parameters())
    try:
        with undisturbed(model):
            model(**inputs, summed_loss=True).loss_sum.backward()
        reached = {name for name, parameter in named.items() if parameter.grad is not None}
    finally:
        for parameter in named.values():
            parameter.grad = None
    own = {id(weight) for weight in trained_weights(model).values()}
    wanted = {name for name, weight in named.items() if is_adapter_weight(name) or id(weight) in own}
    trained = reached | {name for name, parameter in named.items() if parameter.requires_grad}
    biases = {name for name in named if name.endswith(".bias") and recipe.lora.bias != "none"}
    lines = [
        *(f"{name} gets no gradient: the model does not use it for text" for name in sorted(wanted - reached)),
        *(f"{name} would be trained, but was not asked for" for name in sorted(trained - wanted - biases)),
    ]
    if lines:
        advice = {
            "lora": "the settings in lora say; give other names in lora.target_modules",
            "full": "method full says; method freeze with freeze.modules trains those that you name",
            "freeze": "the settings in freeze say; give other names in freeze.modules",
        }
        raise LoratuneError(
            f"{counted(len(lines), 'weight')} would not be trained as {advice[recipe.method]}:\n"
            f"{bullet_list(lines, limit=SHOWN)}",
            Exit.USAGE,
        )
    return len(wanted)
