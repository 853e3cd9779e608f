"""A GPU that computes on the CPU: its tensors have values, say that they are elsewhere, and do not mix with others.

The device is torch's "xla", which no installed package implements: what reaches it is one of these tensors, or fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from loratune.model.hardware import Hardware

CARD = torch.device("xla", 0)
CPU = torch.device("cpu")
MIXING = {"copy_", "_to_copy", "to", "index", "index_put_", "_unsafe_index"}
"""Operators that take tensors of two devices: copies, and an index on the CPU of what is on a GPU."""
READ = (
    torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__bool__,
    torch.Tensor.__index__, torch.Tensor.__format__, torch.Tensor.__repr__, torch.Tensor.__contains__,
)  # fmt: skip

NEW = (
    torch.Tensor.new_empty, torch.Tensor.new_zeros, torch.Tensor.new_ones, torch.Tensor.new_full,
    torch.Tensor.new_tensor,
)  # fmt: skip


class OnCard(torch.Tensor):
    """A tensor of the GPU."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> OnCard:
        made: OnCard = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, dtype=values.dtype, device=CARD, strides=values.stride(),
            storage_offset=values.storage_offset(),
        )  # fmt: skip
        made.values = values
        return made

    @property  # type: ignore[override]
    def data(self) -> torch.Tensor:
        return OnCard(self.values)

    @data.setter
    def data(self, other: OnCard) -> None:
        self.values = other.values

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
        if function in READ:
            arguments, settings = tree_map_only(OnCard, lambda one: one.values, (arguments, settings or {}))
            return function(*arguments, **settings)
        if function is torch.Tensor.copy_:
            target, source, *_ = (one.values if isinstance(one, OnCard) else one for one in arguments)
            target.copy_(source)
            return arguments[0]
        if function in NEW:
            own, *others = arguments
            return OnCard(function(own.values, *others, **(settings or {})))
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            return _indexed(function, *arguments)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*arguments, **(settings or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, _: Any, arguments: Any = (), settings: Any = None) -> Any:
        return _computed(function, arguments, settings or {})


def _indexed(function: Any, tensor: Any, index: Any, value: Any = None) -> Any:
    """Index values, since torch would ask for the device before anything sees the call."""
    if not isinstance(tensor, OnCard) or (isinstance(value, torch.Tensor) and not isinstance(value, OnCard)):
        raise RuntimeError("index: expected all tensors to be on the same device")
    own, index, value = tree_map_only(OnCard, lambda one: one.values, (tensor, index, value))
    return OnCard(function(own, index)) if value is None else function(own, index, value)


def _computed(function: Any, arguments: Any, settings: dict[str, Any]) -> Any:
    name = function._schema.name.partition("::")[2]
    tensors = [leaf for leaf in tree_leaves((arguments, settings)) if isinstance(leaf, torch.Tensor)]
    is_on_card = [isinstance(tensor, OnCard) for tensor in tensors]
    elsewhere = [one for one in tensors if not isinstance(one, OnCard) and one.ndim]
    if any(is_on_card) and elsewhere and name not in MIXING:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    if name.startswith(("index", "_unsafe_index")) and any(is_on_card) and not is_on_card[0]:
        raise RuntimeError(f"{name}: indices should be on the CPU or on the device of the indexed tensor")
    asked = [leaf for leaf in tree_leaves((arguments, settings)) if isinstance(leaf, torch.device)]
    goes_to_card = asked[0].type == CARD.type if asked else bool(is_on_card) and is_on_card[0]
    if not asked and name not in MIXING:
        goes_to_card = any(is_on_card)
    arguments, settings = tree_map_only(torch.device, lambda _: CPU, (arguments, settings))
    own, named = tree_map_only(OnCard, lambda one: one.values, (arguments, settings))
    result = function(*own, **named)
    known = {id(one.values): one for one in tensors if isinstance(one, OnCard)}
    if not goes_to_card:
        return result
    return tree_map_only(torch.Tensor, lambda one: known[id(one)] if id(one) in known else OnCard(one), result)


class _Machine(TorchDispatchMode):
    """Also sees what makes tensors, or copies them to the GPU."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
        return _computed(function, arguments, settings or {})


@contextmanager
def card() -> Iterator[Hardware]:
    """Have a machine with the GPU."""
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor would make its tensor out of sight
    try:
        with _Machine():
            yield _Card(CARD, True, "a card")
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


class _Card(Hardware):
    @property
    def is_gpu(self) -> bool:
        return True
