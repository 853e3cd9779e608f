"""Learning rates of groups of weights: LoRA+ (Hayou et al. 2024) has another one for the matrices B."""

from __future__ import annotations

from typing import Any

from loratune.protocols import AdaptedModel


def with_rate_ratio(optimizer: Any, model: AdaptedModel, ratio: float) -> Any:
    """Divide the groups of a fresh optimizer by learning rate, and return it.

    Args:
        optimizer: an optimizer of torch's interface.
        model: the model that it trains.
        ratio: `lora.b_learning_rate_ratio`. As in PEFT, vectors, such as biases, have the rate of the matrices B.
    """
    if ratio == 1:
        return optimizer
    named = model.named_parameters()
    fast = {id(weight) for name, weight in named if ".lora_B." in name or weight.ndim == 1}
    groups = []
    for group in optimizer.param_groups:
        for is_fast in (False, True):
            weights = [weight for weight in group["params"] if (id(weight) in fast) == is_fast]
            if weights:
                groups.append(group | {"params": weights, "lr": group["lr"] * (ratio if is_fast else 1)})
    optimizer.param_groups[:] = groups
    return optimizer
