"""Writes a model folder with nf4 weights, for programs that read bitsandbytes' format."""

from __future__ import annotations

from pathlib import Path

from loratune.model.base import load_base
from loratune.model.from_folder import load_plain
from loratune.model.hardware import detect_hardware
from loratune.model.weights.unpacked import keep_unpacked
from loratune.protocols import CausalModel
from loratune.recipe.sections import ModelSettings


def write_quantized(model: Path, folder: Path) -> CausalModel:
    """Quantise a model and write it; the model in memory is returned, to be compared with what the folder gives.

    Args:
        model: folder in full precision.
        folder: existing folder for config and weights.
    """
    settings = ModelSettings(base=str(model), quantization="nf4", compute_dtype="bfloat16")
    quantized = load_base(settings, model, detect_hardware(), in_own_format=False)
    keep_unpacked(quantized)  # the packed form cannot be saved
    quantized.save_pretrained(folder)
    return quantized.eval()


def load_quantized(folder: Path) -> CausalModel:
    """The written model, which computes exactly as the one that was written."""
    model = load_plain(folder, is_quantized=True)
    keep_unpacked(model)
    return model
