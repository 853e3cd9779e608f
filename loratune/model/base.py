"""Loads the base model, optionally quantised."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import BitsAndBytesConfig

from loratune.errors import Exit, LoratuneError
from loratune.extras import needs
from loratune.model.architecture.roles import expert_stacks, kept_in_16_bits, quantised_matrices
from loratune.model.config import empty_model, load_config
from loratune.model.from_folder import load_from_folder
from loratune.model.hardware import Hardware, resolve_attention, resolve_dtype
from loratune.protocols import CausalModel
from loratune.recipe.sections import ModelSettings


def load_base(settings: ModelSettings, folder: Path, hardware: Hardware, in_own_format: bool = True) -> CausalModel:
    """The base model on its device, frozen, quantised or sharded if asked.

    Args:
        settings: the recipe's model section.
        folder: model folder.
        hardware: this machine.
        in_own_format: quantise what bitsandbytes has no file format for too: stacks of matrices, to nf4.

    Raises:
        LoratuneError: this machine does not support the settings, or weights and config do not match.
    """
    dtype = resolve_dtype(settings.dtype, hardware)
    attention = resolve_attention(settings.attn_implementation, hardware, dtype)
    parts = _parts_to_quantise(settings, folder, in_own_format)
    if is_to_be_sharded(settings, hardware):
        return _load_sharded(settings, folder, hardware, dtype, attention, parts)
    options = {"dtype": dtype, "attn_implementation": attention, "device_map": {"": hardware.device}}
    if parts is None:
        return load_from_folder(folder, **options)
    from loratune.model.weights.int8_linear import complete_int8  # takes bitsandbytes
    from loratune.model.weights.quantized_check import check_quantised

    if parts.stacks:  # other implementations take whole stacks
        options["experts_implementation"] = "eager"
    config = _quantization(settings, hardware, parts)
    model = load_from_folder(folder, quantization_config=config, **options)
    check_quantised(model, parts.matrices, parts.stacks, folder)
    complete_int8(model)
    return model


class _Parts(NamedTuple):
    """What of a model is quantised, and what is not."""

    matrices: set[str]
    """Names of the weights of linear modules that are quantised."""
    stacks: set[str]
    """Names of the stacks of matrices that are quantised."""
    kept: set[str]
    """Names of the linear modules that are not quantised."""


def _parts_to_quantise(settings: ModelSettings, folder: Path, in_own_format: bool) -> _Parts | None:
    """Return what of a base is to be quantised; None if nothing is.

    Raises:
        LoratuneError: bitsandbytes is missing, or has nothing to quantise.
    """
    if settings.quantization == "none":
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise LoratuneError(needs(f"model.quantization {settings.quantization}", "bitsandbytes"), Exit.USAGE)
    empty = empty_model(load_config(folder))
    require_quantisable(settings, empty)
    stacks = set(expert_stacks(empty)) if in_own_format and settings.quantization == "nf4" else set[str]()
    return _Parts(quantised_matrices(empty), stacks, kept_in_16_bits(empty))


def _load_sharded(
    settings: ModelSettings, folder: Path, hardware: Hardware, dtype: torch.dtype, attention: str, parts: _Parts | None
) -> CausalModel:
    from loratune.model.sharding.sharded_base import load_sharded  # takes torch.distributed
    from loratune.model.weights.quantized_rows import Quantised  # takes bitsandbytes

    quantised = None
    if parts:
        computed = resolve_dtype(settings.compute_dtype, hardware)
        quantised = Quantised(parts.matrices, parts.stacks, computed, settings.double_quantization)
    return load_sharded(folder, hardware, dtype, attention, quantised)


def is_to_be_sharded(settings: ModelSettings, hardware: Hardware) -> bool:
    """Return whether each process is to hold a part of the base; one alone would hold all of it anyway."""
    return settings.sharding == "fsdp" and hardware.is_distributed


def require_quantisable(settings: ModelSettings, model: CausalModel) -> None:
    """Raise if a base is to be quantised and has nothing that bitsandbytes quantises, as GPT-2.

    Raises:
        LoratuneError: says what to take instead.
    """
    if settings.quantization != "none" and not quantised_matrices(model) | {*expert_stacks(model)}:
        raise LoratuneError(
            f"model.quantization {settings.quantization}: {type(model).__name__} has no layer that bitsandbytes can "
            "quantise; take model.quantization none",
            Exit.USAGE,
        )


def _quantization(settings: ModelSettings, hardware: Hardware, parts: _Parts) -> BitsAndBytesConfig:
    kept = sorted(parts.kept)
    if settings.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    from loratune.model.weights.quantizer import StacksConfig  # takes bitsandbytes

    return (StacksConfig if parts.stacks else BitsAndBytesConfig)(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=settings.double_quantization,
        bnb_4bit_compute_dtype=resolve_dtype(settings.compute_dtype, hardware),
        llm_int8_skip_modules=kept,
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name: `bfloat16` of `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")
