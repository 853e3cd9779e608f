"""Computes LoRA layers in inference mode for rows of several adapters.

PEFT computes them one adapter after the other, and selects their rows by lists, each of which becomes a tensor that a
GPU waits for. Here the matrices of all adapters of a pass are stacked: two products give the branches of all adapters
for all rows, and a factor between them is 0 for those that are not a row's own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

_MOST_STACKS = 4
"""Sets of adapters whose matrices a layer keeps; prompts and running answers may have different ones."""


@dataclass(frozen=True)
class _Stack:
    """Matrices of some adapters of a layer in the dtype of the products, one below the other."""

    weights: list[Any]
    """The parameters themselves, so that no other one gets the identity of one of them."""
    made_of: tuple[Any, ...]
    down: Any
    """(ranks, in)."""
    up: Any
    """(out, ranks)."""
    factors: Any
    """(adapters, ranks): an adapter's scaling where a rank is its own, otherwise 0."""


_stacks: WeakKeyDictionary[Any, dict[tuple[str, ...], _Stack]] = WeakKeyDictionary()


def mixed_lora_output(layer: Any, x: Any, names: tuple[str, ...]) -> Any:
    """Return the output of a plain layer where each row has its own adapter: (rows, …, in) → (rows, …, out).

    Args:
        layer: PEFT's layer.
        x: in a dtype in which the whole layer can compute; dropout is off.
        names: the adapter of each row; one that the layer does not have leaves the base's output.
    """
    dense = x.contiguous()  # a bfloat16 product of strided rows is a hundred times slower on a CPU
    y = layer.base_layer(dense)
    adapters, numbers = _numbered(names, x.device)
    if any(name in layer.lora_A for name in adapters):
        stack = _stack(layer, adapters, x.dtype)
        reduced = (_rows(dense) @ stack.down.t()).view(len(names), -1, len(stack.down))
        reduced *= stack.factors[numbers].unsqueeze(1)
        _rows(y).addmm_(_rows(reduced), stack.up.t())
    return y


def forget_stacks() -> None:
    """Let go of the matrices that layers keep, after an adapter has been taken off."""
    _stacks.clear()


@functools.lru_cache(maxsize=64)
def _numbered(names: tuple[str, ...], device: Any) -> tuple[tuple[str, ...], Any]:
    """Return the different names, and the number of each row's name among them: int64 [rows] on the device."""
    adapters = tuple(sorted(set(names)))
    numbers = torch.tensor([adapters.index(name) for name in names])
    return adapters, numbers.to(device, non_blocking=True)


def _stack(layer: Any, adapters: tuple[str, ...], dtype: Any) -> _Stack:
    """Return the matrices of some adapters, rounded once; they are made again when one of them changes."""
    kept = _stacks.setdefault(layer, {})
    own = [name for name in adapters if name in layer.lora_A]
    weights = [part[name].weight for part in (layer.lora_A, layer.lora_B) for name in own]
    made_of = (dtype, *map(_state, weights), *(layer.scaling[name] for name in own))
    found = kept.get(adapters)
    if found is None or found.made_of != made_of:
        if len(kept) >= _MOST_STACKS:
            kept.clear()
        down, up = _joined(weights[: len(own)], 0, dtype), _joined(weights[len(own) :], 1, dtype)
        found = kept[adapters] = _Stack(weights, made_of, down, up, _factors(layer, adapters, down))
    return found


def _state(weight: Any) -> tuple[Any, ...]:
    """What differs after a matrix has changed in place, or has moved to another dtype or device."""
    return id(weight), weight._version, weight.dtype, weight.device


def _joined(matrices: list[Any], dim: int, dtype: Any) -> Any:
    rounded = [matrix.detach().to(dtype) for matrix in matrices]
    return rounded[0] if len(rounded) == 1 else torch.cat(rounded, dim)


def _factors(layer: Any, adapters: tuple[str, ...], down: Any) -> Any:
    """Return each adapter's factor for each rank of a stack: (adapters, ranks)."""
    owners = [name for name in adapters if name in layer.lora_A for _ in layer.lora_A[name].weight]
    values = [[layer.scaling[owner] if owner == name else 0.0 for owner in owners] for name in adapters]
    return torch.tensor(values, dtype=down.dtype).to(down.device, non_blocking=True)


def _rows(tensor: Any) -> Any:
    """View (…, features) as (rows, features)."""
    return tensor.view(-1, tensor.shape[-1])
