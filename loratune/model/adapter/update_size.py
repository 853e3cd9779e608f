"""Measures how much an adapter changes its base, without computing the product of its matrices."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight

from loratune.model.adapter.tensors import PREFIX
from loratune.protocols import AdaptedModel


def update_sizes(model: AdaptedModel, adapter: str = "default") -> dict[str, dict[str, float]]:
    """Return target name → module → ‖ΔW‖ / ‖W‖ in Frobenius norms.

    Args:
        model: the model with the adapter.
        adapter: PEFT's name of the adapter.
    """
    ratios: dict[str, dict[str, float]] = defaultdict(dict)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            ratios[name.rpartition(".")[2]][name.removeprefix(PREFIX)] = _ratio(module, adapter)
    return dict(ratios)


def _ratio(module: Any, adapter: str) -> float:
    """‖s·BA‖² is the sum of (BᵀB)∘(AAᵀ), two matrices of rank × rank."""
    down, up = (getattr(module, part)[adapter].weight.detach().double() for part in ("lora_A", "lora_B"))
    squared = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0)
    weight = dequantize_module_weight(module.get_base_layer()).detach()
    return float(abs(module.scaling[adapter]) * squared.sqrt() / weight.float().norm())
