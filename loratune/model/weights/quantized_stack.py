"""Stacks of matrices in 4 bits: a mixture's layers have them in one parameter, which bitsandbytes leaves as it is.

Each matrix is quantised by itself, as bitsandbytes quantises a linear layer's. A forward pass dequantises those that
some token is sent to, one at a time, and the backward pass dequantises them again, so that none is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any, TypeGuard

import bitsandbytes
import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from loratune.model.architecture.expert_pass import by_single_matrices, declares_layout
from loratune.model.weights.stack import Stack, use_stacks

bnb: Any = bitsandbytes  # partly untyped


class QuantizedParameter(nn.Parameter):
    """The codes of a stack of matrices, uint8 (matrices, bytes of a matrix, 1)."""

    states: list[Any]
    """bitsandbytes' scales and shape of each matrix."""

    def __new__(cls, codes: torch.Tensor, states: list[Any]) -> QuantizedParameter:
        made: QuantizedParameter = torch.Tensor._make_subclass(cls, codes, False)
        made.states = states
        return made

    def first_values(self, number: int, count: int) -> torch.Tensor:
        """Return the first values of a matrix, dequantised; at most those of the first block with a scale."""
        state = copy.copy(self.states[number])
        state.absmax, state.shape = state.absmax[:1], torch.Size((count,))
        if state.nested:
            state.state2 = copy.copy(state.state2)
            state.state2.absmax = state.state2.absmax[:1]
        return bnb.functional.dequantize_4bit(self.data[number, : (count + 1) // 2], state)


class QuantizedMatrix:
    """A frozen matrix that products with it dequantise, forward and backward; other functions get it dequantised.

    Args:
        codes: uint8 (bytes, 1); their storage may be empty between forward and backward.
        state: bitsandbytes' scales and shape.
        dtype: products are computed in it.
    """

    def __init__(self, codes: torch.Tensor, state: Any, dtype: torch.dtype) -> None:
        self.codes, self.state, self.dtype = codes, state, dtype

    def dequantised(self) -> torch.Tensor:
        """Return the matrix, in the dtype that it had."""
        return bnb.functional.dequantize_4bit(self.codes, self.state)

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
        codes: of the stack, uint8 (matrices, bytes of a matrix, 1); None until the first pass.
        states: bitsandbytes' scales and shape of each matrix.
        compute_dtype: of products with it.
    """

    def __init__(self, codes: torch.Tensor | None, states: list[Any], compute_dtype: torch.dtype) -> None:
        shape = torch.Size((len(states), *states[0].shape))
        super().__init__(self._dequantised, shape, states[0].absmax.device)
        self.codes, self.states, self.compute_dtype, self.dtype = codes, states, compute_dtype, states[0].dtype

    original: Callable[[int], torch.Tensor] | None = None
    """Returns the matrix of a number to compute with in place of the quantised one."""

    def __getitem__(self, number: Any) -> Any:
        """Return the matrix of a number; a float32 tensor if it is changed."""
        if self.original:
            return self.original(int(number)).to(self.device, self.dtype)
        if self.changes:
            return super().__getitem__(number)
        return self._matrix(int(number))

    def take(self, parameter: torch.Tensor) -> None:
        """Compute with these codes."""
        self.codes = parameter.data

    def _matrix(self, number: int) -> QuantizedMatrix:
        assert self.codes is not None
        return QuantizedMatrix(self.codes[number], self.states[number], self.compute_dtype)

    def _dequantised(self, number: int) -> torch.Tensor:
        return self._matrix(number).dequantised()

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
        own, state = bnb.functional.quantize_4bit(matrix.contiguous(), quant_type="nf4", compress_statistics=double)
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
            stacks = {name: QuantizedStack(one.data, one.states, compute_dtype) for name, one in parameters.items()}
            compute_with_stacks(module, stacks)


def compute_with_stacks(module: nn.Module, stacks: Mapping[str, QuantizedStack]) -> None:
    """Let a module compute with quantised stacks in place of its parameters of these names."""
    if declares_layout(module):
        module.forward = MethodType(by_single_matrices, module)
    use_stacks(module, stacks)


def is_quantized_stack(parameter: Any) -> TypeGuard[QuantizedParameter]:
    """Return whether a parameter is a quantised stack."""
    return isinstance(parameter, QuantizedParameter)
