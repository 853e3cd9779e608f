"""The model families that loratune is tested with, and the names that a model itself does not provide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """Names of a family."""

    models: str
    """Models of it, as people call them."""
    gguf: str | None = None
    """Name of its architecture in GGUF, if that is another than transformers' own."""


FAMILIES = {
    "qwen2": Family("Qwen2, Qwen2.5, Qwen2.5-Coder"),
    "qwen3": Family("Qwen3, dense"),
    "llama": Family("Llama 2, Llama 3, SmolLM2"),
    # Mistral has Llama's weights and computation, and GGUF uses one architecture for both.
    "mistral": Family("Mistral 7B, Mistral Nemo", gguf="llama"),
    "cohere2": Family("Command R7B, Command A"),
    "deepseek_v3": Family("DeepSeek-V3, DeepSeek-R1"),
    "ernie4_5": Family("ERNIE 4.5, dense"),
    "gemma2": Family("Gemma 2"),
    "gemma3": Family("Gemma 3 from 4B on"),
    "gemma3_text": Family("Gemma 3 1B"),
    "gemma4": Family("Gemma 4"),
    "gemma4_text": Family("Gemma 4, language model alone"),
    "glm4": Family("GLM-4, dense"),
    "glm4_moe": Family("GLM-4.5, GLM-4.6, GLM-4.7"),
    "gpt2": Family("GPT-2"),
    "gpt_oss": Family("gpt-oss"),
    "granitemoehybrid": Family("Granite 4"),
    "hunyuan_v1_dense": Family("Hunyuan, dense"),
    "internlm3": Family("InternLM3"),
    "lfm2": Family("LFM2"),
    "minicpm3": Family("MiniCPM3"),
    "ministral3": Family("Ministral 3"),
    "mixtral": Family("Mixtral"),
    "olmo3": Family("OLMo 3"),
    "phi3": Family("Phi-3, Phi-4"),
    "qwen2_5_vl": Family("Qwen2.5-VL"),
    "qwen2_moe": Family("Qwen1.5-MoE, Qwen2-57B-A14B"),
    "qwen3_5": Family("Qwen3.5, Qwen3.6, Qwen3.8, dense"),
    "qwen3_5_moe": Family("Qwen3.5, Qwen3.6, with experts"),
    "qwen3_5_moe_text": Family("Qwen3.5 with experts, language model alone"),
    "qwen3_5_text": Family("Qwen3.5, dense, language model alone"),
    "qwen3_moe": Family("Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder"),
    "qwen3_next": Family("Qwen3-Next, Qwen3-Coder-Next"),
    "qwen3_vl": Family("Qwen3-VL, dense"),
    "seed_oss": Family("Seed-OSS"),
    "smollm3": Family("SmolLM3"),
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


def is_native(model_type: Any) -> bool:
    """Return whether transformers itself has a language model of this type."""
    if not isinstance(model_type, str):
        return False
    if model_type in FAMILIES:
        return True
    # Only for an architecture that loratune does not know: the import takes a second.
    from transformers.models.auto import modeling_auto as known

    return any(
        model_type in names
        for names in (known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    )
