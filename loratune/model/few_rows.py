"""Products of a few rows with a large float32 matrix on a CPU, which is what a step of decoding consists of.

Such a product should be as fast as the matrix can be read, but MKL computes it on one core, or nearly so: with 8 rows
the head of Qwen2.5 0.5B takes 76 ms on one core and 59 ms on two, which read it in 15 ms. As a batch of products with
blocks of the matrix, which MKL shares among the cores, it takes 28 ms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

MOST_ROWS = 32
"""With more, the products themselves take longer than reading the matrix."""
LEAST_WEIGHTS = 1 << 18
"""Smaller matrices stay in the caches."""
BLOCK = 32
"""Rows of a matrix that are taken at once."""


class FewRowProducts(TorchFunctionMode):
    """Has `functional.linear`, wherever it is called, read a large matrix block by block if there are few rows.

    Only without gradients: the results are the same but for rounding.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called with each function of torch."""
        if func is functional.linear and not kwargs and _is_served(*args):
            return _linear(*args)
        return func(*args, **(kwargs or {}))


def _is_served(x: Any, weight: Any, *_: Any) -> bool:
    return (
        weight.numel() >= LEAST_WEIGHTS
        and x.numel() <= MOST_ROWS * weight.shape[-1]
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and weight.is_contiguous()
        and not torch.is_grad_enabled()
    )


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    width, rows = weight.shape[1], x.reshape(-1, x.shape[-1])
    whole = len(weight) // BLOCK * BLOCK
    blocks = weight[:whole].view(-1, BLOCK, width)
    if len(rows) == 1:
        y = torch.bmm(blocks, rows.t().expand(len(blocks), -1, -1)).view(1, whole)
    else:
        y = (
            torch.bmm(rows.expand(len(blocks), -1, -1), blocks.transpose(1, 2))
            .transpose(0, 1)
            .reshape(len(rows), whole)
        )
    if whole < len(weight):
        y = torch.cat([y, rows @ weight[whole:].t()], dim=1)
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], len(weight))
