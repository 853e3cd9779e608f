"""The supported model families, with the names that a model itself does not provide."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Names of a family in other programs."""

    gguf: str
    """Architecture name in GGUF."""


FAMILIES = {
    "qwen2": Family(gguf="qwen2"),
    "qwen3": Family(gguf="qwen3"),
    "llama": Family(gguf="llama"),
    # Mistral has Llama's weights and computation, and GGUF uses one architecture for both.
    "mistral": Family(gguf="llama"),
}
"""model_type of config.json → its family; transformers has the code."""
