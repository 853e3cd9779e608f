"""The weight that a linear layer computes with, quantised or not."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight


def held_weight(module: Any) -> torch.Tensor:
    """Return the weight that a linear layer computes with, dequantised if it is quantised."""
    if type(module.weight).__name__ != "Int8Params":
        return dequantize_module_weight(module)
    scaled: torch.Tensor = module.weight_in(torch.float32)
    return scaled
