"""Stacks of matrices in 4 bits: a mixture's layers have them in one parameter, which bitsandbytes leaves as it is.

Each matrix is quantised by itself, as bitsandbytes quantises a linear layer's. A forward pass dequantises those that
some token is sent to, one at a time, and the backward pass dequantises them again, so that none is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeGuard

import bitsandbytes.functional as bnb
import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from loratune.model.architecture.expert_pass import by_single_matrices, declares_layout
from loratune.model.weights.stack import Stack, use_stacks


class QuantizedParameter(nn.Parameter):
    """The codes of a stack of matrices, uint8 (matrices, bytes of a matrix, 1)."""

    states: list[Any]
    """bitsandbytes' scales and shape of each matrix."""

    def __new__(cls, codes: torch.Tensor, states: list[Any]) -> QuantizedParameter:
        made: QuantizedParameter = torch.Tensor._make_subclass(cls, codes, False)
        made.states = states
        return made

    def matrix(self, number: int) -> torch.Tensor:
        """Return a dequantised matrix, in the dtype that it had."""
        return bnb.dequantize_4bit(self.data[number], self.states[number])

    def first_values(self, number: int, count: int) -> torch.Tensor:
        """Return the first values of a matrix, dequantised; at most those of the first block with a scale."""
        state = copy.copy(self.states[number])
        state.absmax, state.shape = state.absmax[:1], torch.Size((count,))
        if state.nested:
            state.state2 = copy.copy(state.state2)
            state.state2.absmax = state.state2.absmax[:1]
        return bnb.dequantize_4bit(self.data[number, : (count + 1) // 2], state)


class QuantizedMatrix:
    """A frozen matrix that products with it dequantise, forward and backward; other functions get it dequantised.

    Args:
        parameter: the stack.
        number: index of the matrix.
        dtype: products are computed in it.
    """

    def __init__(self, parameter: QuantizedParameter, number: int, dtype: torch.dtype) -> None:
        self.parameter, self.number, self.dtype = parameter, number, dtype

    def dequantised(self) -> torch.Tensor:
        """Return the matrix."""
        return self.parameter.matrix(self.number)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute or method of the dequantised matrix, such as its transpose."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dequantised(), name)

    @classmethod
    def __torch_function__(cls, function: Any, _: Any, arguments: Any = (), settings: Any = None) -> Any:
        if function is functional.linear and not settings and isinstance(arguments[1], cls):
            inputs, matrix, *bias = arguments
            output = _Product.apply(inputs, matrix, True)
            return output if bias in ([], [None]) else output + bias[0]
        if function in PRODUCTS and not settings and not isinstance(arguments[0], cls):
            return _Product.apply(*arguments, False)
        given, named = tree_map_only(cls, cls.dequantised, (tuple(arguments), settings or {}))
        return function(*given, **named)


PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class _Product(torch.autograd.Function):
    """Multiplies inputs (..., columns) with a quantised matrix or its transpose; the inputs alone have a gradient."""

    @staticmethod
    def forward(context: Any, inputs: torch.Tensor, matrix: QuantizedMatrix, is_transposed: bool) -> torch.Tensor:
        context.matrix, context.is_transposed = matrix, is_transposed
        weight = matrix.dequantised().to(matrix.dtype)
        return (inputs.to(matrix.dtype) @ (weight.T if is_transposed else weight)).to(inputs.dtype)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        matrix = context.matrix
        weight = matrix.dequantised().to(matrix.dtype)
        computed = gradient.to(matrix.dtype) @ (weight if context.is_transposed else weight.T)
        return computed.to(gradient.dtype), None, None


class QuantizedStack(Stack):
    """Stands in for a quantised stack during its module's forward pass.

    Args:
        parameter: the stack.
        compute_dtype: of products with it.
    """

    def __init__(self, parameter: QuantizedParameter, compute_dtype: torch.dtype) -> None:
        super().__init__(parameter.matrix, torch.Size((len(parameter), *parameter.states[0].shape)), parameter.device)
        self.parameter, self.compute_dtype, self.dtype = parameter, compute_dtype, parameter.states[0].dtype

    original: Callable[[int], torch.Tensor] | None = None
    """Returns the matrix of a number to compute with in place of the quantised one."""

    def __getitem__(self, number: Any) -> Any:
        """Return the matrix of a number; a float32 tensor if it is changed."""
        if self.original:
            return self.original(int(number)).to(self.device, self.dtype)
        if self.changes:
            return super().__getitem__(number)
        return QuantizedMatrix(self.parameter, int(number), self.compute_dtype)

    def whole(self) -> torch.Tensor:
        """Return all matrices."""
        matrices = (self[number] for number in range(len(self)))
        return torch.stack([one.dequantised() if isinstance(one, QuantizedMatrix) else one for one in matrices])


def quantize_stack(values: torch.Tensor, double: bool) -> QuantizedParameter:
    """Quantise a stack (matrices, rows, columns) to nf4, each matrix by itself.

    Args:
        values: in 16 or 32 bits.
        double: quantise the scales too.
    """
    states, codes = list[Any](), None
    for number, matrix in enumerate(values):
        own, state = bnb.quantize_4bit(matrix.contiguous(), quant_type="nf4", compress_statistics=double)
        codes = own.new_empty(len(values), *own.shape) if codes is None else codes
        codes[number] = own
        if states:  # the tables of codes are the same for all
            state.code = states[0].code
            if double:
                state.state2.code = states[0].state2.code
        states.append(state)
    return QuantizedParameter(codes, states)


def use_quantized_stacks(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Let the modules of a model compute with their quantised stacks.

    Args:
        model: its modules read a stack one matrix at a time.
        compute_dtype: of products with them.
    """
    for module in model.modules():
        parameters = {name: one for name, one in module._parameters.items() if is_quantized_stack(one)}
        if parameters:
            if declares_layout(module):
                module.forward = MethodType(by_single_matrices, module)
            use_stacks(module, {name: QuantizedStack(one, compute_dtype) for name, one in parameters.items()})


def is_quantized_stack(parameter: Any) -> TypeGuard[QuantizedParameter]:
    """Return whether a parameter is a quantised stack."""
    return isinstance(parameter, QuantizedParameter)
