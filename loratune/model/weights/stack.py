"""Stacks of matrices that a forward pass reads one matrix at a time, in float32.

A mixture has the matrices of all its parts in one parameter. Its forward pass takes those that some token is sent to.
Only these are read from the files, and only one is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

Changed = Callable[[torch.Tensor, int], torch.Tensor]
"""Makes another matrix of a matrix and its number in the stack."""


class Stack:
    """Stands in for a parameter (matrices, rows, columns) during its module's forward pass.

    Args:
        read: returns the matrix of a number, in any dtype.
        shape: of the parameter.
        device: of the matrices that are read.
    """

    dtype, is_floating_point = torch.float32, lambda _: True

    def __init__(self, read: Callable[[int], torch.Tensor], shape: torch.Size, device: torch.device) -> None:
        self.read, self.shape, self.ndim, self.device = read, shape, len(shape), device
        self.changes: list[Changed] = []
        """Applied in order to each float32 matrix that is read, such as an adapter's update."""

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, number: Any) -> torch.Tensor:
        """Return the float32 matrix of a number, which may be a tensor without dimensions."""
        matrix = self.read(int(number)).float()
        for change in self.changes:
            matrix = change(matrix, int(number))
        return matrix

    def take(self, parameter: Any) -> None:
        """Get the parameter that the stack stands in for, before each forward pass."""

    def whole(self) -> torch.Tensor:
        """Return all matrices, in float32."""
        return torch.stack([self[number] for number in range(len(self))])

    @classmethod
    def __torch_function__(cls, function: Any, _: Any, arguments: Any = (), settings: Any = None) -> Any:
        """Compute with the whole stack, for a forward pass that does not take single matrices."""
        arguments = (one.whole() if isinstance(one, cls) else one for one in arguments)
        return function(*arguments, **(settings or {}))


def use_stacks(module: nn.Module, stacks: Mapping[str, Stack]) -> None:
    """Let a module's forward pass read stacks in place of its parameters of these names."""
    module.stacks, forward = stacks, module.forward

    def with_stacks(*arguments: Any, **settings: Any) -> Any:
        kept = {name: module._parameters[name] for name in stacks}
        for name, stack in stacks.items():
            stack.take(kept[name])
        module._parameters.update(stacks)
        try:
            return forward(*arguments, **settings)
        finally:
            module._parameters.update(kept)

    module.forward = with_stacks


def stacks_of(module: nn.Module) -> Mapping[str, Stack]:
    """Return the stacks that a module reads, by the names of its parameters."""
    found: Mapping[str, Stack] = getattr(module, "stacks", {})
    return found
