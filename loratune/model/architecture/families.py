"""The families of models that loratune supports, and what can be asked of no model: their names elsewhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What other programs call a family."""

    gguf: str
    """Its architecture in GGUF."""


FAMILIES = {
    "qwen2": Family(gguf="qwen2"),
    "qwen3": Family(gguf="qwen3"),
    "llama": Family(gguf="llama"),
    # Mistral's weights and computation are Llama's, and GGUF has one architecture for both.
    "mistral": Family(gguf="llama"),
}
"""model_type of config.json → its family; their code is part of transformers."""
