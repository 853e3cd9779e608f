"""base + adapter with just the rounding that merging has added, so that a merged model can be held to it exactly.

Rounding merged weights to 16 bits moves a model's outputs by 1e-5 nats or by 1e-2, as the update's size decides: a
light update is lost in part. No bound on the distance from base + adapter tells that from a wrong merge. So the
reference gets the same rounding errors, computed from PEFT's own merge and not from the written files. What then lies
between it and the merged model is the arithmetic of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from torch.nn import functional

from loratune.model.adapter.own_parameters import parameter_modules
from loratune.model.adapter.peft_merge import Change
from loratune.model.architecture.structure import causal_model
from loratune.protocols import CausalModel

PIECE_VALUES = 2_000_000
"""Values of a matrix that are computed at once."""


@dataclass(frozen=True)
class Rounding:
    """How a parameter of the reference became a merged tensor."""

    dtype: torch.dtype
    """Of the written tensor."""
    change: Change | None = None
    """What PEFT does to it."""
    original: torch.Tensor | None = None
    """What was merged into, where the reference does not compute with it: the plain weights of a quantised base."""
    held_as: torch.dtype | None = None
    """The type that dequantised weights are rounded to before they are merged into; None for others."""

    def error(self, held: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """What the written rows differ by from PEFT's merge of the reference's own, in float32.

        Args:
            held: rows that the reference computes with.
            numbers: which rows they are.
        """
        merged_into = held.to(self.held_as or held.dtype) if self.original is None else self.original[numbers]
        written = _merged(self.change, merged_into, numbers).to(self.dtype)
        # The reference holds trained tokens and whole parameters of the adapter as its own: LoRA alone is beside them.
        exact = _merged(replace(self.change, tokens=[]) if self.change else None, held, numbers)
        return (written.to(exact.dtype) - exact).float()


def _merged(change: Change | None, rows: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    if change is None:
        return rows.float()
    return change.rows(rows.double() if change.needs_float64 else rows.float(), numbers)


@contextmanager
def rounded_as(model: CausalModel, roundings: Mapping[str, Rounding]) -> Iterator[None]:
    """Let a reference compute with the rounding errors of merged weights.

    Args:
        model: base + adapter, in float32 arithmetic.
        roundings: name of a parameter of the base → how it was rounded.
    """
    modules, hooks, kept = parameter_modules(causal_model(model)), list[Any](), list[tuple[Any, torch.Tensor]]()
    # Around the whole layer: DoRA scales what the base's own part of it returns.
    around = {id(module.base_layer): module for module in model.modules() if hasattr(module, "base_layer")}
    for name, rounding in roundings.items():
        module, attribute = modules[name], name.rpartition(".")[2]
        parameter = getattr(module, attribute)
        hook = _hook(module, rounding) if attribute == "weight" else None
        if hook:
            hooks.append(around.get(id(module), module).register_forward_hook(hook))
        else:
            kept.append((parameter, parameter.data))
            parameter.data = parameter.float() + rounding.error(parameter.data, torch.arange(len(parameter)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, values in kept:
            parameter.data = values


def _hook(module: Any, rounding: Rounding) -> Callable[..., torch.Tensor] | None:
    """What adds a weight's rounding error to its layer's output; None for layers that are neither linear nor lookups.

    The errors of a whole matrix never are in memory at once.
    """

    def of_linear(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        weight, values, output = dequantize_module_weight(module), inputs[0].float(), output.float()
        for numbers in torch.arange(len(weight)).split(max(1, PIECE_VALUES // weight.shape[1])):
            rows = slice(int(numbers[0]), int(numbers[-1]) + 1)
            output[..., rows] += functional.linear(values, rounding.error(weight[rows], numbers))
        return output

    def of_embedding(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        tokens, places = inputs[0].unique(return_inverse=True)
        return output.float() + rounding.error(module.weight[tokens], tokens)[places]

    if isinstance(module, nn.Embedding):
        return of_embedding
    return of_linear if isinstance(module, nn.Linear) else None
