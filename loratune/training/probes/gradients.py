"""Measures which weights get a gradient."""

from __future__ import annotations

from typing import Any

from loratune.errors import Exit, LoratuneError, bullet_list, counted
from loratune.model.adapter.attach import is_adapter_weight
from loratune.protocols import AdaptedModel
from loratune.recipe.method_sections import LoraSettings
from loratune.training.probes.passes import undisturbed

SHOWN = 8


def check_gradients(model: AdaptedModel, settings: LoraSettings, inputs: dict[str, Any]) -> int:
    """Check with a small pass that every weight of the adapter gets a gradient, and that no other weight would train.

    Args:
        model: the model with its labelled loss, and without gradients.
        settings: what the adapter trains.
        inputs: a pass with labels.

    Returns:
        The number of the adapter's weights.

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
    wanted = {name for name in named if is_adapter_weight(name)}
    trained = reached | {name for name, parameter in named.items() if parameter.requires_grad}
    biases = {name for name in named if name.endswith(".bias") and settings.bias != "none"}
    lines = [
        *(f"{name} gets no gradient: the model does not use it for text" for name in sorted(wanted - reached)),
        *(f"{name} would be trained, but does not belong to the adapter" for name in sorted(trained - wanted - biases)),
    ]
    if lines:
        raise LoratuneError(
            f"{counted(len(lines), 'weight')} would not be trained as the settings in lora say; give other names in "
            f"lora.target_modules:\n{bullet_list(lines, limit=SHOWN)}",
            Exit.USAGE,
        )
    return len(wanted)
