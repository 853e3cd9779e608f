"""The weight that a linear layer computes with, quantised or not."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight


def held_weight(module: Any) -> torch.Tensor:
    """Return the weight that a linear layer computes with, dequantised if it is quantised."""
    if type(module.weight).__name__ != "Int8Params":
        return dequantize_module_weight(module)
    if module.weight.CB is not None:  # before its first forward pass
        module.init_8bit_state()
    scaled: torch.Tensor = module.state.CB.float() * (module.state.SCB.float() / 127).unsqueeze(1)
    return scaled
