"""A base as PEFT alone would use it: a copy with the same weights in memory, and a saved adapter on it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from loratune.model.adapter.attach import is_adapter_weight
from loratune.model.weights.stack import stacks_of
from loratune.model.weights.unpacked import keep_unpacked
from loratune.protocols import AdaptedModel, CausalModel

QUANTISED_STATES = ("state", "quant_state")
"""bitsandbytes' attributes of a layer with tensors that are neither parameters nor buffers."""


def with_same_weights(model: CausalModel) -> CausalModel:
    """Return a copy of a model's modules, with the model's own weights and buffers.

    Args:
        model: a causal language model without an adapter, as transformers loaded it.
    """
    # PEFT changes requires_grad of the copy's parameters. Those of quantised layers have classes of their own.
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
        if type(parameter) is nn.Parameter
        else parameter
        for parameter in model.parameters()
    }
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    quantised = (getattr(module, name, None) for module in model.modules() for name in QUANTISED_STATES)
    memo |= {id(state): state for state in quantised if state is not None}
    memo |= {id(stack): stack for module in model.modules() for stack in stacks_of(module).values()}
    copied = copy.deepcopy(model, memo)
    keep_unpacked(copied)
    return copied


def load_by_peft(base: CausalModel, folder: Path) -> AdaptedModel:
    """Load a saved adapter with PEFT alone.

    Args:
        base: result of `with_same_weights`; it is changed.
        folder: PEFT folder.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of missing tensors, which the caller compares itself
        loaded: AdaptedModel = PeftModel.from_pretrained(base, str(folder), torch_device=str(base.device))
    return loaded.eval()


def differing_tensors(trained: AdaptedModel, loaded: AdaptedModel) -> list[str]:
    """Return the names of the trained weights, and of LoRA layers' scales, that differ between two PEFT models."""
    own, other = (dict(model.named_parameters()) for model in (trained, loaded))
    wanted = {name for name, parameter in own.items() if parameter.requires_grad or is_adapter_weight(name)}
    strange = [name for name in other if is_adapter_weight(name) and name not in wanted]
    different = [name for name in wanted if name not in other or not _are_equal(own[name], other[name])]
    scales, others = (_scales(model) for model in (trained, loaded))
    return sorted([*strange, *different, *(f"{name}.scaling" for name in scales if scales[name] != others.get(name))])


@contextmanager
def perturbed(model: AdaptedModel) -> Iterator[None]:
    """Give a fresh adapter an effect, by random values in place of its zeros, and restore it afterwards."""
    generator = torch.Generator().manual_seed(0)
    kept: list[tuple[Any, torch.Tensor]] = []
    with torch.no_grad():
        for _, layer in _lora_layers(model):
            for part in (layer.lora_B, layer.lora_embedding_B):
                for name, value in part.items():
                    weight = getattr(value, "weight", value)
                    kept.append((weight, weight.clone()))
                    deviation = 0.5 / (layer.scaling[name] * layer.r[name] ** 0.5)
                    weight.copy_(deviation * torch.randn(weight.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in kept:
                weight.copy_(value)


def _lora_layers(model: AdaptedModel) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def _scales(model: AdaptedModel) -> dict[str, dict[str, float]]:
    return {name: dict(layer.scaling) for name, layer in _lora_layers(model)}


def _are_equal(own: torch.Tensor, other: torch.Tensor) -> bool:
    return own.shape == other.shape and bool((own == other.to(own.dtype)).all())
