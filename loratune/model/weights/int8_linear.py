"""LLM.int8 layers that take inputs of any shape, and whose weights can be dequantised on a CPU."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from torch import nn
from torch.nn import functional

from loratune.model.weights.trained_bias import OwnBias

bnb: Any = bitsandbytes  # partly untyped
PIECE_VALUES = 1 << 20
"""Values that are dequantised at a time on a CPU."""


class Int8Linear(OwnBias, bnb.nn.Linear8bitLt):
    """bitsandbytes' layer, with what it lacks for some models and for DoRA.

    It takes inputs of two or three dimensions; multi-head latent attention has four.

    PEFT dequantises the weight in each pass of DoRA, and on a CPU puts a copy there that shares its memory. The copy
    has no scales, since the first pass has moved them into the layer's state, and the next pass would take none from
    it. So the weight stays in the copy's place.
    """

    compute_dtype = None
    """It computes in the dtype of its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output (..., out) of inputs (..., in)."""
        rows = x.reshape(-1, x.shape[-1])
        if self.training and x.device.type == "cpu" and not torch.is_grad_enabled():
            # What bitsandbytes computes in training on a CPU, with the whole weight in float32 twice on the way.
            bias = None if self.bias is None else self.bias.to(x.dtype)
            made = functional.linear(rows, self.weight_in(x.dtype), bias)
        else:
            made = super().forward(rows)
        return made.view(*x.shape[:-1], self.out_features)

    def weight_in(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight (out, in) that codes and scales stand for, in a dtype."""
        if self.weight.CB is not None:  # before its first forward pass
            self.init_8bit_state()
        codes, scales = self.state.CB, (self.state.SCB.float() / 127).unsqueeze(1)
        weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
        # A CPU multiplies numbers of different dtypes by way of copies in float32.
        count = len(codes) if codes.is_cuda else max(1, PIECE_VALUES // codes.shape[1])
        for start in range(0, len(codes), count):
            piece = slice(start, start + count)
            torch.mul(codes[piece], scales[piece], out=weight[piece])
        return weight

    def __setattr__(self, name: str, value: Any) -> None:
        held = self._parameters.get("weight") if name == "weight" else None
        if held is None or not isinstance(value, torch.Tensor) or not _share_memory(held, value):
            super().__setattr__(name, value)


def complete_int8(model: nn.Module) -> None:
    """Make the LLM.int8 layers of a model `Int8Linear`."""
    for module in model.modules():
        if type(module) is bnb.nn.Linear8bitLt:
            module.__class__ = Int8Linear


def _share_memory(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(tensor.untyped_storage()._cdata == other.untyped_storage()._cdata)
