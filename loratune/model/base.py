"""Loads the base model, optionally quantised."""

from __future__ import annotations

import importlib.util
from pathlib import Path

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
    if is_to_be_sharded(settings, hardware):
        from loratune.model.sharding.sharded_base import load_sharded  # takes torch.distributed

        return load_sharded(folder, hardware, dtype, attention)
    options = {"dtype": dtype, "attn_implementation": attention, "device_map": {"": hardware.device}}
    if settings.quantization == "none":
        return load_from_folder(folder, **options)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise LoratuneError(needs(f"model.quantization {settings.quantization}", "bitsandbytes"), Exit.USAGE)
    from loratune.model.weights.quantized_check import check_quantised  # takes bitsandbytes

    empty = empty_model(load_config(folder))
    matrices, kept = quantised_matrices(empty), kept_in_16_bits(empty)
    stacks = set(expert_stacks(empty)) if in_own_format and settings.quantization == "nf4" else set[str]()
    require_quantisable(settings, empty)
    if stacks:  # other implementations take whole stacks
        options["experts_implementation"] = "eager"
    config = _quantization(settings, hardware, sorted(kept), bool(stacks))
    model = load_from_folder(folder, quantization_config=config, **options)
    check_quantised(model, matrices, stacks, folder)
    return model


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


def _quantization(
    settings: ModelSettings, hardware: Hardware, kept: list[str], with_stacks: bool
) -> BitsAndBytesConfig:
    if settings.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    from loratune.model.weights.quantizer import StacksConfig  # takes bitsandbytes

    return (StacksConfig if with_stacks else BitsAndBytesConfig)(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=settings.double_quantization,
        bnb_4bit_compute_dtype=resolve_dtype(settings.compute_dtype, hardware),
        llm_int8_skip_modules=kept,
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name: `bfloat16` of `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")
