"""4-bit weights whose codes can be divided by rows, as a base is that is sharded over several processes.

bitsandbytes keeps the codes of a matrix in one column, in a parameter of a class of its own that also has the scales,
and that no division keeps. Here the codes are an ordinary parameter with a row for each row of the matrix, or for each
matrix of a stack. The scales, an eighth of a bit for each value if they are quantised too, belong to the module, whole
in every process. Codes and scales have the values that bitsandbytes computes of the whole matrix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import bitsandbytes
import torch
from torch import nn

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

bnb: Any = bitsandbytes  # partly untyped
BLOCK = 64
"""Values with one scale."""
SCALES_BLOCK = 256
"""Scales with one scale, where they are quantised too."""


class Quantised(NamedTuple):
    """What of a model is quantised to nf4, and how."""

    matrices: set[str]
    """Names of the weights of linear layers."""
    stacks: set[str]
    """Names of the parameters with a matrix for each expert."""
    compute_dtype: torch.dtype
    """Of products."""
    double: bool
    """Whether the scales are quantised too."""


class QuantizedLinear(nn.Linear):
    """A frozen linear layer in nf4: computes what bitsandbytes' `Linear4bit` does.

    Its weight is uint8 (out, in / 2), two codes in a byte.

    Args:
        layer: the layer that it replaces, whose weight is to be quantised.
        compute_dtype: of products.
    """

    quant_state: QuantState
    """Scales of all rows, and shape and dtype of the matrix."""

    def __init__(self, layer: nn.Linear, compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.compute_dtype = layer.in_features, layer.out_features, compute_dtype
        self.weight, self.bias = _codes((layer.out_features, layer.in_features // 2)), layer.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the layer's output (..., out) in the dtype of the input (..., in)."""
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        inputs, codes = input.to(self.compute_dtype), self.weight.view(-1, 1)
        return bnb.matmul_4bit(inputs, codes, quant_state=self.quant_state, bias=bias).to(input.dtype)

    def dequantised(self) -> torch.Tensor:
        """Return the matrix (out, in), in the dtype that it had."""
        return bnb.functional.dequantize_4bit(self.weight.data.view(-1, 1), self.quant_state)

    # PEFT's DoRA adds to a layer's weight, unless the layer has these two, which are named as HQQ's.
    dequantize = dequantised

    @property
    def W_q(self) -> nn.Parameter:  # noqa: N802
        """The codes."""
        return self.weight


def make_quantized(model: nn.Module, quantised: Quantised) -> None:
    """Replace what is to be quantised by codes without values.

    Args:
        model: on the meta device.
        quantised: what of it.
    """
    for name in quantised.matrices:
        path, _, attribute = name.removesuffix(".weight").rpartition(".")
        parent = model.get_submodule(path)
        setattr(parent, attribute, QuantizedLinear(getattr(parent, attribute), quantised.compute_dtype))
    for name in quantised.stacks:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        matrices, *size = module._parameters[attribute].shape
        module._parameters[attribute] = _codes((matrices, -(-size[0] * size[1] // 2), 1))


def quantise(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise matrices, or rows of a matrix that have whole blocks.

    Args:
        values: (matrices or rows, ...).

    Returns:
        For each, the codes, uint8 (matrices or rows, bytes), and the scales, float32 (matrices or rows, blocks).
    """
    count, size = len(values), values.shape[1:].numel()
    if not count:
        codes = values.new_empty(0, -(-size // 2), dtype=torch.uint8)
        return codes, values.new_empty(0, -(-size // BLOCK), dtype=torch.float32)
    if not size % BLOCK:
        codes, scales = _quantise(values)
        return codes.view(count, -1), scales.view(count, -1)
    parts = [_quantise(matrix) for matrix in values]
    return torch.stack([codes.flatten() for codes, _ in parts]), torch.stack([scales for _, scales in parts])


def _quantise(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, state = bnb.functional.quantize_4bit(values.contiguous(), quant_type="nf4", blocksize=BLOCK)
    return codes, state.absmax


def state_of_scales(scales: torch.Tensor, shape: torch.Size, dtype: torch.dtype, double: bool) -> QuantState:
    """Return what bitsandbytes keeps of a quantised matrix, given the scales of its blocks, float32 (blocks).

    Args:
        scales: of all rows.
        shape: of the matrix.
        dtype: that it had.
        double: quantise the scales too.
    """
    code = bnb.functional.get_4bit_type("nf4", device=scales.device)
    state: dict[str, Any] = {"shape": shape, "code": code, "blocksize": BLOCK, "quant_type": "nf4", "dtype": dtype}
    made: QuantState
    if not double:
        made = bnb.functional.QuantState(absmax=scales, **state)
        return made
    offset = scales.mean()
    codes, of_scales = bnb.functional.quantize_blockwise(scales - offset, blocksize=SCALES_BLOCK)
    made = bnb.functional.QuantState(absmax=codes, offset=offset, state2=of_scales, **state)
    return made


def _codes(shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.uint8, device="meta"), requires_grad=False)
