"""Puts adapters that have been read on a model, in the place of others, and takes them off."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import PeftModelForCausalLM, set_peft_model_state_dict

from loratune.errors import Exit, LoratuneError
from loratune.model.adapter.own_parameters import own_parameters
from loratune.model.adapter.reading import ReadAdapter, first_lines
from loratune.model.architecture.structure import is_adapted
from loratune.model.kernels.lora_inference import forget_stacks
from loratune.protocols import AdaptedModel, CausalModel

MAGNITUDE = "lora_magnitude_vector"


def put_adapter(model: CausalModel, read: ReadAdapter, name: str, keep_dtype: bool = False) -> AdaptedModel:
    """Have PEFT put an adapter on its base, which stays as it is.

    Args:
        model: the base, or a model with other adapters.
        read: the adapter, read for this base.
        name: PEFT's name for it.
        keep_dtype: see `OwnParameters.add`.

    Raises:
        LoratuneError: PEFT refuses it.
    """
    own = own_parameters(model)
    own.add(name, read.tensors, keep_dtype)
    own.select([name])  # PEFT derives the shapes of the adapter's matrices from the base's
    try:
        with warnings.catch_warnings():
            # Warnings about tied matrices and biases, which PEFT cannot merge; loratune merges or rejects them.
            warnings.simplefilter("ignore", UserWarning)
            if is_adapted(model):
                adapted = model
                adapted.add_adapter(name, read.config)
            else:
                adapted = PeftModelForCausalLM(model, read.config, name)
            set_peft_model_state_dict(adapted, read.tensors.lora, name)
    except (RuntimeError, ValueError, KeyError) as error:
        raise LoratuneError(
            f"{read.folder}: the adapter does not fit the base model: {first_lines(str(error))}", Exit.MODEL
        ) from error
    own.select([adapted.active_adapter])
    return adapted.eval()


def replace_adapter(model: AdaptedModel, read: ReadAdapter, name: str) -> bool:
    """Copy an adapter into the tensors of another one of the same layout, which is gone then.

    It takes as long as copying the values, while PEFT goes through all modules of the model several times, and leaves
    no object behind.

    Args:
        model: a PEFT model.
        read: the adapter, read for this base.
        name: PEFT's name of the other one.

    Returns:
        Whether that was possible. It is not if PEFT keeps something that is computed of the tensors, as for DoRA.
    """
    held, lora = _tensors_of(model, name), read.tensors.lora
    has_same = held.keys() == lora.keys() and all(held[key].shape == lora[key].shape for key in lora)
    if not has_same or read.config.use_dora:
        return False
    with torch.no_grad():
        for key, values in lora.items():
            held[key].copy_(values)
    own = own_parameters(model)
    own.remove(name)
    own.add(name, read.tensors)
    return True


def remove_adapter(model: AdaptedModel, name: str) -> None:
    """Take an adapter off a model, with everything that is kept of it; another one must be there."""
    own_parameters(model).remove(name)
    if name in model.peft_config:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about which other adapter is active now
            model.delete_adapter(name)
        model.set_adapter(next(iter(model.peft_config)))  # PEFT's layers and model may name different ones
    forget_stacks()


def _tensors_of(model: AdaptedModel, name: str) -> dict[str, Any]:
    """Return an adapter's parameters in a model by their names in a file."""
    found = {}
    for path, parameter in model.named_parameters():
        parts = path.split(".")
        if name in parts:
            key = ".".join(part for part in parts if part != name)
            found[key.removesuffix(".weight") if MAGNITUDE in parts else key] = parameter
    return found
