"""The weight that a linear layer computes with, quantised or not, and layers that compute with nothing else."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch.nn import functional

from loratune.model.architecture.structure import causal_model
from loratune.protocols import CausalModel


def held_weight(module: Any) -> torch.Tensor:
    """Return the weight that a linear layer computes with, dequantised if it is quantised."""
    if type(module.weight).__name__ != "Int8Params":
        return dequantize_module_weight(module)
    scaled: torch.Tensor = module.weight_in(torch.float32)
    return scaled


def exact_linear(module: Any, inputs: torch.Tensor) -> torch.Tensor:
    """Return a linear layer's output of inputs (…, in) and its held weight, summed in float32, in the inputs' dtype."""
    bias = None if module.bias is None else module.bias.float()
    return functional.linear(inputs.float(), held_weight(module).float(), bias).to(inputs.dtype)


def is_unrounded(module: Any) -> bool:
    """Return whether a layer computes by `exact_linear`, as `inputs_unrounded` has it."""
    return getattr(vars(module).get("forward"), "func", None) is exact_linear


def modules_with(model: CausalModel, kind: str) -> list[Any]:
    """Return the modules whose weight is of a class of bitsandbytes, such as `Int8Params`."""
    weights = ((module, module._parameters.get("weight")) for module in causal_model(model).modules())
    return [module for module, weight in weights if type(weight).__name__ == kind]


@contextmanager
def inputs_unrounded(model: CausalModel) -> Iterator[None]:
    """Let layers with LLM.int8 compute with their inputs as they are; they round them to 8 bits otherwise."""
    modules = modules_with(model, "Int8Params")
    for module in modules:
        module.forward = functools.partial(exact_linear, module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward
