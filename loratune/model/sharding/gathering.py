"""Gathers the weights of a sharded base, unit by unit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from loratune.protocols import CausalModel


def sharded_units(model: CausalModel) -> list[Any]:
    """Return the modules whose weights are gathered together, outer ones first; none if a model is not sharded."""
    return [module for module in model.modules() if hasattr(module, "unshard")]


def is_sharded(model: CausalModel) -> bool:
    """Return whether each process holds some rows of the weights only."""
    return bool(sharded_units(model))


@contextmanager
def gathered(module: Any) -> Iterator[bool]:
    """Have the weights of a unit whole, for any number of calls; each process has to do so.

    Yields:
        Whether the module is a unit; on others it has no effect.
    """
    if not hasattr(module, "unshard"):
        yield False
        return
    module.unshard()
    try:
        with without_hooks(module):
            yield True
    finally:
        module.reshard()


@contextmanager
def without_hooks(module: Any) -> Iterator[None]:
    """Call a module without what is to run before and after its forward."""
    hooks = module._forward_pre_hooks, module._forward_hooks
    module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        module._forward_pre_hooks, module._forward_hooks = hooks


def with_weights(model: CausalModel, look: Callable[[Any], object]) -> None:
    """Call a function that looks at weights with the model, or with each part of a sharded one while it is gathered."""
    for unit in sharded_units(model) or [model]:
        with gathered(unit):
            for part in _own_parts(unit):
                look(part)


def gathered_bytes(model: CausalModel) -> int:
    """Return the bytes of gathered weights that exist at a time: of a unit, and of the one that is gathered next."""
    sizes = [
        sum(weight.numel() * weight.element_size() for part in _own_parts(unit) for weight in part.parameters())
        for unit in sharded_units(model)
    ]
    return 2 * max(sizes, default=0)


def base_norms(model: CausalModel) -> dict[str, float]:
    """Return the Frobenius norm of each sharded weight, dequantised; each process has to call this."""
    weights = dict(model.named_parameters())
    shards = {name: weight.to_local() for name, weight in weights.items() if hasattr(weight, "to_local")}
    plain = {name: shard for name, shard in shards.items() if shard.is_floating_point()}
    squares = torch.stack([torch.linalg.vector_norm(shard, dtype=torch.float32) ** 2 for shard in plain.values()])
    torch.distributed.all_reduce(squares)
    norms: dict[str, float] = dict(zip(plain, squares.sqrt().tolist(), strict=True))
    names = {module: f"{path}.weight" for path, module in model.named_modules() if hasattr(module, "dequantised")}

    def look(part: Any) -> None:
        for module in part.modules():
            if module in names:
                norms[names[module]] = float(torch.linalg.vector_norm(module.dequantised(), dtype=torch.float32))

    if names:
        with_weights(model, look)
    return norms


def _own_parts(unit: Any) -> list[Any]:
    """Return what is gathered with a unit: itself, or its parts that neither are units nor have any."""
    if len(sharded_units(unit)) <= 1:
        return [unit]
    return [part for part in unit.children() if not sharded_units(part) and any(True for _ in part.parameters())]
