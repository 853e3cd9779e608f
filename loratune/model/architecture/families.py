"""The model families that loratune is tested with, and the names that a model itself does not provide."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Names of a family in other programs."""

    gguf: str | None = None
    """Name of its architecture in GGUF, if that is another than transformers' own."""


FAMILIES = {
    "qwen2": Family(),
    "qwen3": Family(),
    "llama": Family(),
    # Mistral has Llama's weights and computation, and GGUF uses one architecture for both.
    "mistral": Family(gguf="llama"),
    "cohere2": Family(),
    "deepseek_v3": Family(),
    "ernie4_5": Family(),
    "gemma2": Family(),
    "gemma3": Family(),
    "gemma3_text": Family(),
    "gemma4": Family(),
    "gemma4_text": Family(),
    "glm4": Family(),
    "glm4_moe": Family(),
    "gpt2": Family(),
    "gpt_oss": Family(),
    "granitemoehybrid": Family(),
    "hunyuan_v1_dense": Family(),
    "internlm3": Family(),
    "lfm2": Family(),
    "minicpm3": Family(),
    "ministral3": Family(),
    "mixtral": Family(),
    "olmo3": Family(),
    "phi3": Family(),
    "qwen2_5_vl": Family(),
    "qwen2_moe": Family(),
    "qwen3_5": Family(),
    "qwen3_5_moe": Family(),
    "qwen3_5_moe_text": Family(),
    "qwen3_5_text": Family(),
    "qwen3_moe": Family(),
    "qwen3_next": Family(),
    "qwen3_vl": Family(),
    "seed_oss": Family(),
    "smollm3": Family(),
}
"""model_type of config.json → its family; transformers has the code. Each is tried in the tests with a tiny model."""
GGUF_ARCHITECTURES = (
    "gemma3",
    "lfm2",
    "llama",
    "phi3",
    "qwen2",
    "qwen2moe",
    "qwen3",
    "qwen3moe",
    "qwen3next",
    "qwen35",
    "qwen35moe",
)
"""GGUF's names of the architectures that loratune writes."""
