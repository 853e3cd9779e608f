"""The reference for merged and exported models: base + adapter as trained, in float32 arithmetic."""

from __future__ import annotations

from pathlib import Path

from loratune.model.adapter.attach import keep_unpacked, load_adapter
from loratune.model.base import load_base
from loratune.model.hardware import detect_hardware
from loratune.model.weights.mapped import load_mapped
from loratune.protocols import AdaptedModel
from loratune.recipe.sections import ModelSettings


def load_reference(settings: ModelSettings, base: Path, adapter: Path) -> AdaptedModel:
    """PEFT's own model: the adapter's layers beside the base's, which is quantised if it was in training.

    Args:
        settings: settings of the base in training.
        base: folder of the base.
        adapter: PEFT folder.

    Raises:
        LoratuneError: the adapter does not match, or this machine cannot quantise.
    """
    if settings.quantization == "none":
        return load_adapter(load_mapped(base), adapter, keep_dtype=True)
    # Flash attention would cast to the config's type.
    exact = settings.model_copy(update={"compute_dtype": "float32", "attn_implementation": "sdpa"})
    quantized = load_base(exact, base, detect_hardware())
    keep_unpacked(quantized)  # the packed form computes in bfloat16
    return load_adapter(quantized, adapter).float().eval()
