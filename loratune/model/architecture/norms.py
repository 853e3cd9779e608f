"""Determines how a normalisation layer applies its weight, by running it."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn


def adds_one(module: Any) -> bool:
    """Return whether a norm multiplies by 1 + weight rather than by its weight.

    Args:
        module: a norm, with or without values.
    """
    probe = copy.deepcopy(module).to_empty(device="cpu").float()
    nn.init.zeros_(probe.weight)
    ones = torch.ones(1, *probe.weight.shape)
    required = [each for each in inspect.signature(probe.forward).parameters.values() if each.default is each.empty]
    with torch.no_grad():
        return bool(probe(*[ones] * len(required)).any())  # a gated norm takes the gate too


def is_norm(module: Any) -> bool:
    """Return whether a module is a norm with a weight and no bias."""
    names = [name for name, _ in module.named_parameters()]
    return names == ["weight"] and module.weight.ndim == 1 and type(module).__name__.endswith(("Norm", "NormGated"))
