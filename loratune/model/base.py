"""The base model as an object: its weights, quantised if asked."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from loratune.errors import Exit, LoratuneError
from loratune.model.hardware import Hardware, resolve_attention, resolve_dtype
from loratune.model.tying import head_is_tied
from loratune.recipe.sections import ModelSettings


def load_base(settings: ModelSettings, folder: Path, hardware: Hardware) -> Any:
    """The base model on its device, frozen, quantised if asked.

    Raises:
        LoratuneError: settings that this machine cannot serve, or weights that do not fit the config.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    dtype = resolve_dtype(settings.dtype, hardware)
    is_tied = head_is_tied(folder)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            quantization_config=_quantization(settings, hardware),
            attn_implementation=resolve_attention(settings.attention, hardware),
            device_map={"": hardware.device},
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, StrictDataclassError) as error:
        if "allocate" in str(error):
            raise
        raise LoratuneError(f"{folder}: cannot be loaded: {str(error).splitlines()[0]}", Exit.MODEL) from error
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:5])
        raise LoratuneError(f"{folder}: the weights lack tensors that the model needs: {missing}", Exit.MODEL)
    model.config.tie_word_embeddings = is_tied
    model.requires_grad_(False)
    return model


def _quantization(settings: ModelSettings, hardware: Hardware) -> BitsAndBytesConfig | None:
    if settings.quantization == "none":
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise LoratuneError(
            f"model.quantization {settings.quantization} needs the package bitsandbytes: pip install bitsandbytes",
            Exit.USAGE,
        )
    if settings.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=settings.double_quantization,
        bnb_4bit_compute_dtype=resolve_dtype(settings.compute_dtype, hardware),
    )


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` of `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")
