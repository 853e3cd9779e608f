"""Measures how much an adapter changes its base, without computing the product of its matrices."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from peft.utils.integrations import dequantize_module_weight

from loratune.model.adapter.targets import attached_layers
from loratune.protocols import AdaptedModel


def update_sizes(model: AdaptedModel, adapter: str = "default") -> dict[str, dict[str, float]]:
    """Return target name → module → ‖ΔW‖ / ‖W‖ in Frobenius norms.

    Args:
        model: the model with the adapter.
        adapter: PEFT's name of the adapter.
    """
    ratios: dict[str, dict[str, float]] = defaultdict(dict)
    for name, module in attached_layers(model):
        if adapter in module.lora_A:
            ratios[name.rpartition(".")[2]][name] = _ratio(module, adapter)
    return dict(ratios)


def _ratio(module: Any, adapter: str) -> float:
    """‖s·BA‖² is the sum of (BᵀB)∘(AAᵀ), two matrices of rank × rank, for each matrix of a stack."""
    if isinstance(module, ParamWrapper):
        up, down, _ = module.get_delta_factors(adapter)
        weight = module.get_param()
    else:
        down, up = (getattr(module, part)[adapter].weight for part in ("lora_A", "lora_B"))
        weight = dequantize_module_weight(module.get_base_layer())
    down, up = down.detach().double(), up.detach().double()
    squared = ((up.mT @ up) * (down @ down.mT)).sum().clamp(min=0)
    return float(abs(module.scaling[adapter]) * squared.sqrt() / weight.detach().float().norm())
