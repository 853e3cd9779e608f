"""Quantised layers whose bias keeps its dtype, so that it can be trained in float32."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from torch import nn

bnb: Any = bitsandbytes  # partly untyped


class OwnBias:
    """Adds the bias to what a layer of bitsandbytes computes without one.

    bitsandbytes gives the bias the dtype of the layer's input, in place. AdamW would lose steps below 2⁻⁸ of a trained
    bias in bfloat16 then, and its averages would have another dtype than those of a resumed run.
    """

    _parameters: dict[str, Any]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output (..., out) of inputs (..., in), in their dtype."""
        bias, self._parameters["bias"] = self._parameters["bias"], None
        try:
            made: torch.Tensor = super().forward(x)  # type: ignore[misc]
        finally:
            self._parameters["bias"] = bias
        return made if bias is None else made + bias.to(made.dtype)


class OwnBias4bit(OwnBias, bnb.nn.Linear4bit):
    """bitsandbytes' 4-bit layer with a trained bias."""


def keep_biases(model: nn.Module) -> None:
    """Let trained biases of 4-bit layers keep their dtype; those of LLM.int8 always do."""
    for module in model.modules():
        if type(module) is bnb.nn.Linear4bit and module.bias is not None and module.bias.requires_grad:
            module.__class__ = OwnBias4bit
