"""Measures how much an adapter changes its base, without computing the product of its matrices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from peft.utils.integrations import dequantize_module_weight

from loratune.model.adapter.own_parameters import own_parameters
from loratune.model.adapter.own_weights import trained_weights
from loratune.model.adapter.targets import attached_layers
from loratune.protocols import AdaptedModel


def update_sizes(
    model: AdaptedModel, adapter: str = "default", norms: Mapping[str, float] | None = None
) -> dict[str, dict[str, float]]:
    """Return target name → module → ‖ΔW‖ / ‖W‖ in Frobenius norms; of trained weights of the base, parameters.

    Args:
        model: the model with the adapter.
        adapter: PEFT's name of the adapter.
        norms: ‖W‖ by the base's names, of a base of which this process has a part.
    """
    ratios: dict[str, dict[str, float]] = defaultdict(dict)
    for name, module in attached_layers(model):
        if adapter in module.lora_A:
            ratios[name.rpartition(".")[2]][name] = _ratio(module, adapter, _norm(name, module, norms or {}))
    base = own_parameters(model).base_parameters()
    for name, weight in trained_weights(model).items():
        before = base[name].detach().float()
        if norm := float(before.norm()):  # not of a bias that begins with zeros
            change = weight.detach().float() - before
            ratios[name.removesuffix(".weight").rpartition(".")[2]][name] = float(change.norm()) / norm
    return dict(ratios)


def _norm(name: str, module: Any, norms: Mapping[str, float]) -> float:
    is_stack = isinstance(module, ParamWrapper)
    known = norms.get(name if is_stack else f"{name}.weight")
    if known is not None:
        return known
    weight = module.get_param() if is_stack else dequantize_module_weight(module.get_base_layer())
    return float(weight.detach().float().norm())


def _ratio(module: Any, adapter: str, norm: float) -> float:
    """‖s·BA‖² is the sum of (BᵀB)∘(AAᵀ), two matrices of rank × rank, for each matrix of a stack."""
    if isinstance(module, ParamWrapper):
        up, down, _ = module.get_delta_factors(adapter)
    else:
        down, up = (getattr(module, part)[adapter].weight for part in ("lora_A", "lora_B"))
    down, up = down.detach().double(), up.detach().double()
    squared = ((up.mT @ up) * (down @ down.mT)).sum().clamp(min=0)
    return float(abs(module.scaling[adapter]) * squared.sqrt() / norm)
