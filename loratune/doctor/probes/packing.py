"""Loads a model as training does, and measures whether packed documents see each other, and with which attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from loratune.console import memory
from loratune.doctor.facts import PackingFacts
from loratune.doctor.probes.base import folder_of
from loratune.errors import Exit, LoratuneError, reason_of
from loratune.model.architecture.recurrent import recurrent_modules
from loratune.model.architecture.structure import decoder_of
from loratune.model.base import dtype_name, load_base
from loratune.model.files import weight_files
from loratune.model.hardware import Hardware, detect_hardware, resolve_dtype
from loratune.model.kernels.attention_choice import choose_attention
from loratune.model.memory import free_memory_bytes, is_out_of_memory
from loratune.protocols import AdaptedModel, CausalModel
from loratune.recipe.sections import ModelSettings
from loratune.safetensors_header import count_values
from loratune.training.probes.isolation import choose_packing

BYTES = {"int8": 1.1, "nf4": 0.6}
"""Of a quantised weight, with its share of scales and of what is not quantised."""


def packing_facts(settings: dict[str, Any], is_packed: bool) -> PackingFacts:
    """Load a model and choose its packing.

    Args:
        settings: the recipe's model section.
        is_packed: whether rows are to be packed.

    Raises:
        LoratuneError: the model is not here, does not fit into memory, or cannot be loaded.
    """
    model_settings = ModelSettings.model_validate(settings)
    folder = folder_of(model_settings)
    if folder is None:
        raise LoratuneError("the base is not on this machine", Exit.MODEL)
    hardware = detect_hardware()
    _require_memory(model_settings, folder, hardware)
    try:
        model = load_base(model_settings, folder, hardware)
        return _measured(model, hardware, model_settings.attn_implementation, is_packed)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise LoratuneError(f"out of memory: {reason_of(error)}", Exit.IO) from error


def _measured(model: CausalModel, hardware: Hardware, asked: str, is_packed: bool) -> PackingFacts:
    own = str(model.config._attn_implementation)
    chosen = choose_attention(model, hardware, asked, is_packed)
    packing = choose_packing(cast(AdaptedModel, model), chosen, own) if is_packed else None
    return PackingFacts(
        attention=str(packing.attention if packing else chosen),
        is_packed=packing.is_packed if packing else None,
        reason=packing.reason if packing else "",
        dtype=dtype_name(model.dtype),
        recurrent_layers=len([*recurrent_modules(decoder_of(model))]),
    )


def _require_memory(settings: ModelSettings, folder: Path, hardware: Hardware) -> None:
    """Raise if a model does not fit, because the system may kill more than this process.

    Raises:
        LoratuneError: with both sizes.
    """
    weights = sum(map(count_values, weight_files(folder)))
    dtype: torch.dtype = resolve_dtype(settings.dtype, hardware)
    needed, free = weights * BYTES.get(settings.quantization, dtype.itemsize), free_memory_bytes(hardware)
    if needed > free:
        kind = dtype_name(dtype) if settings.quantization == "none" else settings.quantization
        raise LoratuneError(
            f"out of memory: the base takes {memory(needed)} in {kind}, and {memory(free)} are free on {hardware.name}",
            Exit.IO,
        )
