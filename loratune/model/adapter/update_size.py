"""Measures how much an adapter changes its base, without computing the product of its matrices."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight

from loratune.model.adapter.tensors import PREFIX
from loratune.protocols import AdaptedModel


@dataclass(frozen=True)
class UpdateSize:
    """Update sizes of all modules with one name."""

    modules: int
    median: float
    """‖ΔW‖ / ‖W‖ in Frobenius norms."""
    largest: float
    unchanged: tuple[str, ...]
    """Those whose update is exactly nothing."""
    not_finite: tuple[str, ...]


def update_sizes(model: AdaptedModel, adapter: str = "default") -> dict[str, UpdateSize]:
    """Target name → size of its modules' updates.

    Args:
        model: the model with the adapter.
        adapter: PEFT's name of the adapter.
    """
    ratios: dict[str, dict[str, float]] = defaultdict(dict)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter in module.lora_A:
            ratios[name.rpartition(".")[2]][name.removeprefix(PREFIX)] = _ratio(module, adapter)
    return {group: _size(found) for group, found in ratios.items()}


def _size(ratios: dict[str, float]) -> UpdateSize:
    values = torch.tensor(list(ratios.values()), dtype=torch.float64)
    finite = values[values.isfinite()]
    return UpdateSize(
        len(values),
        float(finite.median()) if len(finite) else float("nan"),
        float(finite.max()) if len(finite) else float("nan"),
        tuple(name for name, ratio in ratios.items() if ratio == 0),
        tuple(name for name, value in zip(ratios, values, strict=True) if not value.isfinite()),
    )


def _ratio(module: Any, adapter: str) -> float:
    """‖s·BA‖² is the sum of (BᵀB)∘(AAᵀ), two matrices of rank × rank."""
    down, up = (getattr(module, part)[adapter].weight.detach().double() for part in ("lora_A", "lora_B"))
    squared = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0)
    weight = dequantize_module_weight(module.get_base_layer()).detach()
    return float(abs(module.scaling[adapter]) * squared.sqrt() / weight.float().norm())
