"""Initial LoRA matrices that are a part of the base's (PiSSA, OLoRA), on a base that stays as it is.

Both begin with a product B₀A₀ of the base's largest components. PEFT subtracts it from the base, and its adapters fit
the changed base only. Here the adapter has twice the rank, and is plain LoRA at any time. With A = A₀ + ΔA and
B = B₀ + ΔB,

    BA − B₀A₀ = B·ΔA + ΔB·A₀ = [B ΔB] · [ΔA; A₀]

The update is computed from small matrices, so that bfloat16 does not round it to multiples of the base's own error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.model.adapter.targets import attached_layers
from loratune.model.weights.dequantised import held_weight
from loratune.protocols import AdaptedModel
from loratune.recipe.method_sections import LoraSettings

ITERATIONS = 16
"""Of the power method; matrices of pretrained models have components of similar size."""


def start_from_base(model: AdaptedModel, settings: LoraSettings) -> None:
    """Set the matrices of a fresh adapter, whose rank is twice that of the recipe, and restrict their gradients.

    Raises:
        LoratuneError: matrices of the base have a lower rank.
    """
    problems = []
    for name, layer in attached_layers(model):
        rank, shape = layer.r["default"] // 2, (layer.out_features, layer.in_features)
        if rank > min(shape):
            problems.append(f"{name}: {shape[0]} × {shape[1]}, of rank {min(shape)} at most")
            continue
        weight: Any = held_weight(layer.get_base_layer()).detach()
        weight = (weight.T if layer.fan_in_fan_out else weight).float()
        split = principal_part if settings.init == "pissa" else orthogonal_part
        first, second = split(weight, rank, layer.scaling["default"])
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            down.copy_(torch.cat([torch.zeros_like(first), first]))
            up.copy_(torch.cat([second, torch.zeros_like(second)], dim=1))
        down.register_post_accumulate_grad_hook(_without_initial)
        up.register_post_accumulate_grad_hook(_of_difference)
    if problems:
        told = bullet_list(problems, limit=5)
        raise LoratuneError(f"lora.init {settings.init}: lora.rank is above the base's own:\n{told}", Exit.USAGE)


def principal_part(weight: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A₀ and B₀ of PiSSA (Meng et al. 2024): s·B₀A₀ is the best approximation of this rank.

    Args:
        weight: matrix of the base in float32 (outputs, inputs).
        rank: rank of the part.
        scale: s, the scale of the layer.
    """
    columns = min(2 * rank + 16, *weight.shape)  # more than needed, for which the power method takes fewer iterations
    left, sizes, right = torch.svd_lowrank(weight, columns, niter=ITERATIONS)
    roots = (sizes[:rank] / scale).sqrt()
    return roots[:, None] * right.T[:rank], left[:, :rank] * roots


def orthogonal_part(weight: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A₀ and B₀ of OLoRA (Büyükakyüz 2024): the first rows of R, and columns of Q, in the base's W = QR.

    Args:
        weight, rank, scale: see `principal_part`; the scale has no effect.
    """
    columns, _ = torch.linalg.qr(weight[:, :rank])
    return columns.T @ weight, columns


def differences(model: AdaptedModel) -> Iterator[tuple[Any, Any]]:
    """Yield B and ΔB of each layer, as views of the trained matrix."""
    for _, layer in attached_layers(model):
        up = layer.lora_B["default"].weight
        yield up.detach().tensor_split(2, dim=1)


def _without_initial(down: Any) -> None:
    """Drop the gradient of A₀, from [ΔA; A₀]."""
    _, initial = down.grad.tensor_split(2)
    initial.zero_()


def _of_difference(up: Any) -> None:
    """Move the gradient of B to ΔB, from [B ΔB]; B follows it."""
    of_sum, of_difference = up.grad.tensor_split(2, dim=1)
    of_difference += of_sum
    of_sum.zero_()
