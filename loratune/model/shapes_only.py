"""Computes with shapes and types alone: tensors have no values, and a model of any size takes no memory."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode


class ShapesOnly:
    """A context in which operators compute no values.

    Tensors with values may take part. What a model asks of values is answered by what is usual: as many labelled
    positions as are given, and as many tokens for each expert.

    Args:
        labelled: positions that a search for labels finds.
    """

    def __init__(self, labelled: int = 0) -> None:
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._answers = _Answers(labelled)
        self._entered = ExitStack()

    def stand_in(self, tensor: torch.Tensor) -> Any:
        """Return the tensor without values that takes the place of one."""
        return self._fakes.from_tensor(tensor)

    def __enter__(self) -> ShapesOnly:
        self._entered.enter_context(self._fakes)
        self._entered.enter_context(self._answers)
        return self

    def __exit__(self, *_: object) -> None:
        self._entered.close()


class _Answers(TorchDispatchMode):
    def __init__(self, labelled: int) -> None:
        super().__init__()
        self._labelled = labelled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((self._labelled, args[0].ndim), dtype=torch.int64)
        if func is torch.ops.aten.searchsorted.Tensor:  # where each expert's tokens end
            tokens, experts = args[0].numel(), args[1].numel()
            with unset_fake_temporarily():
                return torch.tensor([round(tokens * (number + 1) / experts) for number in range(experts)])
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True
        if func is torch.ops.aten._grouped_mm.default:
            # The rule for its shape wants bfloat16 and values that lie side by side.
            plain = [
                one.new_empty(one.shape, dtype=torch.bfloat16)
                if torch.is_tensor(one) and one.is_floating_point()
                else one
                for one in args
            ]
            return func(*plain, **(kwargs or {})).to(args[0].dtype)
        return func(*args, **(kwargs or {}))
