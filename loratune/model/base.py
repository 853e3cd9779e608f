"""Loads the base model, optionally quantised."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from transformers import BitsAndBytesConfig

from loratune.errors import Exit, LoratuneError
from loratune.extras import needs
from loratune.model.from_folder import load_from_folder
from loratune.model.hardware import Hardware, resolve_attention, resolve_dtype
from loratune.protocols import CausalModel
from loratune.recipe.sections import ModelSettings


def load_base(settings: ModelSettings, folder: Path, hardware: Hardware) -> CausalModel:
    """The base model on its device, frozen, quantised if asked.

    Raises:
        LoratuneError: this machine does not support the settings, or weights and config do not match.
    """
    dtype = resolve_dtype(settings.dtype, hardware)
    return load_from_folder(
        folder,
        dtype=dtype,
        quantization_config=_quantization(settings, hardware),
        attn_implementation=resolve_attention(settings.attn_implementation, hardware, dtype),
        device_map={"": hardware.device},
    )


def _quantization(settings: ModelSettings, hardware: Hardware) -> BitsAndBytesConfig | None:
    if settings.quantization == "none":
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise LoratuneError(needs(f"model.quantization {settings.quantization}", "bitsandbytes"), Exit.USAGE)
    if settings.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=settings.double_quantization,
        bnb_4bit_compute_dtype=resolve_dtype(settings.compute_dtype, hardware),
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name: `bfloat16` of `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")
