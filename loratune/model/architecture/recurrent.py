"""Finds the modules of a decoder that carry a state from token to token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from loratune.model.architecture.cache_argument import cache_argument
from loratune.protocols import Decoder


def recurrent_modules(decoder: Decoder) -> Iterator[Any]:
    """Yield the modules with a convolution over tokens, and with a recurrent state in most cases.

    Linear attention, short convolutions and Mamba are such modules. They are recognised by structure: they take a cache
    and have a convolution of their own. Attention takes a cache too, but has no convolution.

    Args:
        decoder: see `decoder_of`.
    """
    for module in decoder.modules():
        has_convolution = any(isinstance(child, nn.Conv1d) for child in module.children())
        if has_convolution and cache_argument(module):
            yield module
