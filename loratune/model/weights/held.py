"""The memory of a model's weights, with what belongs to quantised ones, in total and by role."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from loratune.model.architecture.roles import Role, module_roles
from loratune.protocols import CausalModel

VOCABULARY, REST, NOT_QUANTISED = "embedding and head", "the rest", "not quantised"


def held_bytes(parameter: Any) -> int:
    """Return the bytes of a parameter; of a quantised one, with its scales."""
    return sum(one.numel() * one.element_size() for one in (parameter, *_scales(parameter)))


def own_bytes(parameter: Any) -> int:
    """Return the bytes that this process holds of a parameter: of a sharded one, some rows and all scales."""
    own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    elsewhere = int(parameter.numel() - own.numel())
    return held_bytes(parameter) - elsewhere * int(parameter.element_size())


def value_count(parameter: Any) -> int:
    """Return the number of values of a parameter, before quantisation if it is quantised."""
    states = _states(parameter)
    return sum(state.shape.numel() for state in states) if states else int(parameter.numel())


def is_quantised(parameter: Any) -> bool:
    """Return whether a parameter is quantised: it has a class of its own, or consists of codes."""
    if not isinstance(parameter, nn.Parameter):
        return False
    return type(parameter) not in (nn.Parameter, DTensor) or parameter.dtype == torch.uint8


def bytes_by_group(model: CausalModel, size_of: Callable[[Any], int] = held_bytes) -> dict[str, int]:
    """Return the memory of each group of weights, largest first; groups are named after roles.

    Args:
        model: a causal language model without an adapter. If some of it is quantised, what is not is a group, and the
            experts among that another one.
        size_of: returns the bytes of a parameter.
    """
    roles, found = module_roles(model), defaultdict[str, int](int)
    rest = NOT_QUANTISED if any(is_quantised(parameter) for parameter in model.parameters()) else REST
    for name, parameter in model.named_parameters():
        role = roles.get(name.rpartition(".")[0])
        if role in (Role.EMBEDDING, Role.HEAD):
            group = VOCABULARY
        elif role is None or (rest == NOT_QUANTISED and not is_quantised(parameter)):
            group = f"{role.value}, {rest}" if role is Role.EXPERTS and parameter.ndim > 2 else rest
        else:
            group = role.value
        found[group] += size_of(parameter)
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def converted_bytes(model: CausalModel, stored: torch.dtype) -> int:
    """Return the bytes of files whose values are converted or quantised on loading; all others are used in place.

    Args:
        model: a causal language model without an adapter.
        stored: type of the files' values.
    """
    parameters = [one for one in model.parameters() if is_quantised(one) or one.dtype != stored]
    return sum(value_count(one) for one in parameters) * int(stored.itemsize)


def _states(parameter: Any) -> list[Any]:
    """Return bitsandbytes' states of a 4-bit parameter."""
    state = getattr(parameter, "quant_state", None)
    return list(getattr(parameter, "states", ())) if state is None else [state]


def _scales(parameter: Any) -> Iterator[torch.Tensor]:
    for state in _states(parameter):
        yield state.absmax
        if state.nested:
            yield state.state2.absmax
            yield state.offset
    scales = getattr(parameter, "SCB", None)
    if scales is not None:
        yield scales
