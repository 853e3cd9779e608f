"""Matrix products of a few rows with a large float32 matrix on a CPU, the main work of a decoding step.

Such a product should take as long as reading the matrix, but MKL hardly parallelises it: with 8 rows, the head of
Qwen2.5 0.5B takes 76 ms on one core and 59 ms on two, while reading it takes 15 ms. As a batch of products with blocks
of the matrix, which MKL distributes over the cores, it takes 28 ms.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn

from loratune.protocols import CausalModel

MOST_ROWS = 32
"""With more rows, the arithmetic takes longer than reading the matrix."""
LEAST_WEIGHTS = 1 << 18
"""Smaller matrices fit into the caches."""
BLOCK = 32
"""Rows of the matrix per block."""


def use_few_row_products(model: CausalModel) -> list[Any]:
    """Have the large linear layers of a model take their matrix block by block where they get few rows.

    It applies only without gradients, and results differ only by rounding.

    Returns:
        The layers, for `give_up_few_row_products`.
    """
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and "forward" not in vars(layer)]
    large = [layer for layer in layers if _is_large(layer.weight)]
    for layer in large:
        layer.forward = MethodType(_forward, layer)
    return large


def give_up_few_row_products(layers: list[Any]) -> None:
    """Restore the layers' own forward."""
    for layer in layers:
        if takes_few_rows(layer):
            del layer.forward


def takes_few_rows(layer: Any) -> bool:
    """Return whether a layer uses the forward of this module, which is equivalent to its class's."""
    return getattr(vars(layer).get("forward"), "__func__", None) is _forward


def _is_large(weight: Any) -> bool:
    is_float32 = weight.dtype == torch.float32 and weight.device.type == "cpu"
    return bool(is_float32 and weight.numel() >= LEAST_WEIGHTS)


def _forward(layer: Any, x: Any) -> Any:
    """Replacement forward of a layer: (…, in) → (…, out)."""
    weight = layer.weight
    has_few_rows = x.numel() <= MOST_ROWS * weight.shape[1]
    if torch.is_grad_enabled() or not has_few_rows or x.dtype != weight.dtype or not weight.is_contiguous():
        return nn.Linear.forward(layer, x)
    return _linear(x, weight, layer.bias)


def _linear(x: Any, weight: Any, bias: Any) -> Any:
    width, rows = weight.shape[1], x.reshape(-1, x.shape[-1])
    whole = len(weight) // BLOCK * BLOCK
    blocks = weight[:whole].view(-1, BLOCK, width)
    if len(rows) == 1:
        y = torch.bmm(blocks, rows.t().expand(len(blocks), -1, -1)).view(1, whole)
    else:
        y = torch.bmm(rows.expand(len(blocks), -1, -1), blocks.transpose(1, 2))
        y = y.transpose(0, 1).reshape(len(rows), whole)
    if whole < len(weight):
        y = torch.cat([y, rows @ weight[whole:].t()], dim=1)
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], len(weight))
