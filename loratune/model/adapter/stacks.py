"""Finds which parameter with experts' matrices each tensor of an adapter belongs to.

PEFT wraps the module that holds such parameters once per parameter, so that the file has names such as
`….lora_A.weight` and `….base_layer.lora_A.weight`. Which parameter is the inner one depends on the
order in which the architecture registers them; the shapes tell them apart without it.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from loratune.model.adapter.patterns import targeted_stacks

DOWN, UP = "lora_A.weight", "lora_B.weight"
WRAPPED = ".base_layer"
"""PEFT's mark of a module that it has wrapped: LoRA on the first of several parameters."""


def stack_places(
    values: Mapping[str, Any], base: Mapping[str, Sequence[int]], given: Mapping[str, Sequence[int]]
) -> dict[str, str]:
    """Return which parameter each wrapped module of an adapter's file stands for.

    Args:
        values: result of `settle_patterns`.
        base: parameter name → shape, of the base.
        given: tensor name without PEFT's prefix → shape, of the adapter.

    Returns:
        Name before `.lora_A` → parameter name of the base. Modules whose tensors do not fit are left out.
    """
    by_module = defaultdict[str, list[str]](list)
    for name in targeted_stacks(values, base):
        by_module[name.rpartition(".")[0]].append(name)
    found: dict[str, str] = {}
    for module, parameters in by_module.items():
        found |= wrapped_places(module, parameters, base, given)
    return found


def wrapped_places(
    module: str, parameters: Sequence[str], base: Mapping[str, Sequence[int]], given: Mapping[str, Sequence[int]]
) -> dict[str, str]:
    """Return which of a module's parameters each of its wrappers in a file stands for; none if the tensors do not fit.

    Args:
        module: the module's name in the base.
        parameters: its parameters that may be adapted, in its order, which decides where shapes do not.
        base, given: see `stack_places`.
    """
    depths = range(len(parameters) - 1, -1, -1)  # PEFT wraps the first parameter first
    places = [place for depth in depths if f"{(place := module + WRAPPED * depth)}.{DOWN}" in given]
    for order in itertools.permutations(parameters, len(places)):
        if all(
            _fit(given.get(f"{place}.{DOWN}"), given.get(f"{place}.{UP}"), base[name])
            for place, name in zip(places, order, strict=True)
        ):
            return dict(zip(places, order, strict=True))
    return {}


def stack_factors(
    down: torch.Tensor, up: torch.Tensor, shape: Sequence[int], is_transposed: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of a stack's update, in the orientation of the parameter.

    Args:
        down: A as PEFT saves it, [experts · rank, inputs]: the experts' matrices one below the other.
        up: B, [outputs, rank · experts]: the experts change fastest.
        shape: the parameter's, [experts, rows, columns].
        is_transposed: whether rows are inputs, for a parameter whose matrices are square.

    Returns:
        [experts, rows, rank] and [experts, rank, columns], whose product is the update.
    """
    experts, rows, columns = shape
    first = down.reshape(experts, -1, down.shape[1])
    second = up.reshape(up.shape[0], -1, experts).permute(2, 0, 1)
    fits = (second.shape[1], first.shape[2]) == (rows, columns)
    if fits and not (is_transposed and rows == columns):
        return second, first
    return first.transpose(1, 2), second.transpose(1, 2)


def _fit(down: Sequence[int] | None, up: Sequence[int] | None, shape: Sequence[int]) -> bool:
    if down is None or up is None or len(down) != 2 or len(up) != 2:
        return False
    experts, *sizes = shape
    return sorted((down[1], up[0])) == sorted(sizes) and down[0] == up[1] and down[0] % experts == 0
