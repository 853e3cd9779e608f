"""Finds the modules of a decoder that carry a state from token to token."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from loratune.protocols import Decoder

CACHES = frozenset({"cache_params", "past_key_values"})
"""transformers' names of the argument that carries the state of earlier tokens."""


def recurrent_modules(decoder: Decoder) -> Iterator[Any]:
    """Yield the modules with a convolution over tokens, and with a recurrent state in most cases.

    Linear attention, short convolutions and Mamba are such modules. They are recognised by structure: they take a cache
    and have a convolution of their own. Attention takes a cache too, but has no convolution.

    Args:
        decoder: see `decoder_of`.
    """
    for module in decoder.modules():
        has_convolution = any(isinstance(child, nn.Conv1d) for child in module.children())
        if has_convolution and CACHES & inspect.signature(type(module).forward).parameters.keys():
            yield module
