"""How many rounding steps values are from exact ones: at most half a step where they were rounded once."""

from __future__ import annotations

import torch


def rounding_step(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the distance between adjacent numbers of a dtype around float64 values."""
    limits = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp_min(limits.tiny)).exponent - 1
    return torch.ldexp(torch.ones_like(values), exponent) * limits.eps


def steps_off(rounded: torch.Tensor, exact: torch.Tensor, tolerance: torch.Tensor) -> torch.Tensor:
    """Return how many steps of their dtype rounded values are from exact ones, in float64.

    Args:
        rounded: in the dtype that they were rounded to.
        exact: the values before rounding, of the same shape.
        tolerance: largest error of an exact value, which does not count.
    """
    exact = exact.double()
    return ((rounded.double() - exact).abs() - tolerance) / rounding_step(exact, rounded.dtype)
