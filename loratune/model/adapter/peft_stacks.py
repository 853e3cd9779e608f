"""Merges rows of a stack of matrices with the factors of PEFT's layer, which wraps the parameter of a mixture."""

from __future__ import annotations

from typing import Any

import torch


class StackRows:
    """PEFT's LoRA layer of a stack of matrices, or its part for one matrix.

    Args:
        layer: PEFT's `ParamWrapper` with a loaded adapter.
        name: PEFT's name of the adapter.
    """

    is_dora = False

    def __init__(self, layer: Any, name: str) -> None:
        self.rank = int(layer.r[name])
        up, down, self._scaling = layer.get_delta_factors(name)
        self._up, self._down = up.detach(), down.detach()
        self._start = 0

    def matrix(self, number: int, start: int = 0) -> StackRows:
        """Return the part for one matrix of the stack, whose rows are counted from `start` on."""
        part = StackRows.__new__(StackRows)
        part.rank, part._scaling, part._start = self.rank, self._scaling, start
        part._up, part._down = self._up[number], self._down[number]
        return part

    def merge(self, base: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Return merged rows.

        Args:
            base: (n, columns) rows of a matrix, or n matrices of the stack, in the dtype of the computation; not
                modified.
            numbers: numbers of the rows or matrices (n,).
        """
        up, down = self._factors(numbers)
        return base.add(up.to(base) @ down.to(base), alpha=self._scaling)

    def merged_matrix(self, base: torch.Tensor, number: int) -> torch.Tensor:
        """Return one merged matrix of the stack, in the dtype of the base's."""
        return self.matrix(number).merge(base, torch.arange(len(base)))

    def merge_bias(self, base: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        """Return the bias itself: PEFT has no such layers with biases of their own."""
        return base

    def run(self, *_: torch.Tensor) -> None:
        """Compute nothing: PEFT's layer has no forward pass of its own, but changes the parameter for its module's."""

    def largest_updates(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return an upper bound of |s|·Σ|B||A| per row or matrix (n,)."""
        up, down = self._factors(numbers)
        bounds = up.float().abs() @ down.float().abs().amax(-1, keepdim=True)
        return abs(self._scaling) * bounds.reshape(len(numbers), -1).amax(-1)

    def _factors(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        is_stack = self._down.ndim == 3
        return self._up[numbers + self._start], self._down[numbers] if is_stack else self._down
