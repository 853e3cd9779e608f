"""Trained matrices in the dtype of the products, rounded once per optimizer step instead of in every pass."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.autograd.graph import increment_version
from torch.optim.optimizer import register_optimizer_step_post_hook


class RoundedWeight:
    """A trained matrix, in the dtype of the products.

    The version counter of a weight says whether it has changed. Code that writes to its memory otherwise has to raise
    the counter, as `watch_optimizers` does for optimizers.
    """

    def __init__(self, weight: Any) -> None:
        self.weight = weight
        self._source: tuple[Any, ...] | None = None
        self._value: Any = None

    def times(self, factor: float, dtype: Any) -> Any:
        """Return the matrix times a number, for use without autograd; it is kept only if the dtype differs."""
        weight = self.weight
        if weight.dtype == dtype:
            return weight if factor == 1 else weight * factor
        if weight.is_inference():  # its changes are not counted
            return (weight * factor).to(dtype)
        source = (id(weight), weight._version, weight.device, factor, dtype)  # a copy starts with another version
        if source != self._source:
            # The next training step may save a tensor that validation has made.
            with torch.inference_mode(False), torch.no_grad():
                self._value = (weight if factor == 1 else weight * factor).to(dtype)
            self._source = source
        return self._value


@functools.cache
def watch_optimizers() -> None:
    """Raise the version of every weight after an optimizer step; those of bitsandbytes write past torch."""

    def raise_versions(optimizer: Any, *_: Any) -> None:
        increment_version(weight for group in optimizer.param_groups for weight in group["params"])

    register_optimizer_step_post_hook(raise_versions)
