"""How far a right result may lie from another: rounding, bounded by the dtype and the number of summed terms."""

from __future__ import annotations

import torch


def assert_same_but_rounding(
    got: torch.Tensor, expected: torch.Tensor, terms: int, name: str = "", dtype: torch.dtype | None = None
) -> None:
    """Compare a tensor with another that is computed in another order, or in float64.

    Each of the two is off by at most eps × terms × size, where an exact one is not off.

    Args:
        got: in any floating dtype.
        expected: in the same dtype or in float64.
        terms: how many products are summed on the longest way to a value, all layers together.
        name: for the message.
        dtype: that sums are rounded to, if not the tensors' own.
    """
    size = float(expected.detach().abs().max()) if expected.numel() else 0.0
    bound = size * terms * sum(torch.finfo(dtype or tensor.dtype).eps for tensor in (got, expected))
    torch.testing.assert_close(
        got.double(), expected.double(), rtol=0, atol=bound, msg=lambda text: f"{name}: {text}".removeprefix(": ")
    )
