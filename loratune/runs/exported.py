"""What is recorded of an export beside its logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class GgufReadBack:
    """What a GGUF file that was read again holds."""

    tensors: int
    tokens: int
    """Of the vocabulary."""
    bytes_by_type: Mapping[str, int]
    fallbacks: tuple[str, ...]
    """Tensors that stay f16 since q8_0 cannot hold their rows."""
    largest_difference: float
    """Of two weights."""


@dataclass(frozen=True)
class ServedAdapter:
    """An exported adapter as other programs load it."""

    model_class: str
    """transformers' name of the class of its base."""
    modules: int
    """Adapted modules."""
    largest_difference: float | None = None
    """Of two logits, from the run's adapter in the class of the training; None if the models were not run."""
    largest_change: float | None = None
    """Of two logits, from the base's."""
