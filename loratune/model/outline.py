"""A base without weights: its modules with shapes and types, made of a config alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import torch
from torch import nn
from transformers.initialization import no_init_weights

from loratune.model.architecture.roles import expert_stacks, kept_in_16_bits, quantised_matrices
from loratune.model.base import require_quantisable
from loratune.model.config import auto_class, load_config
from loratune.model.from_folder import supported_attention
from loratune.model.hardware import Hardware, resolve_attention, resolve_dtype
from loratune.model.sharding.quantized_shards import use_states
from loratune.model.sharding.sharded_base import keep_in_float32
from loratune.model.weights.quantized_rows import BLOCK, Quantised, make_quantized, state_of_scales
from loratune.protocols import CausalModel
from loratune.recipe.sections import ModelSettings

bnb: Any = bitsandbytes  # partly untyped
VALUE = 0.02
"""Of all weights, so that what is compared between two ways to compute a module is of a usual size."""


def outline(settings: ModelSettings, folder: Path, hardware: Hardware) -> CausalModel:
    """A causal language model whose parameters have the shapes and types of a loaded one, on the meta device.

    Args:
        settings: the recipe's model section.
        folder: a folder with a config.json.
        hardware: that it is meant for.

    Raises:
        LoratuneError: the config or the settings do not make a model.
    """
    config, dtype = load_config(folder), resolve_dtype(settings.dtype, hardware)
    attention = supported_attention(config, resolve_attention(settings.attn_implementation, hardware, dtype))
    options = {"dtype": dtype, "attn_implementation": attention}
    with torch.device("meta"), no_init_weights():
        model: Any = auto_class(type(config)).from_config(config, **options)
    require_quantisable(settings, model)
    keep_in_float32(model)
    model.tie_weights()
    model.requires_grad_(False)
    stacks = set(expert_stacks(model)) if settings.quantization == "nf4" else set[str]()
    if stacks:
        model.set_experts_implementation("eager")
    if settings.quantization == "int8":
        _make_int8(model)
    elif settings.quantization == "nf4":
        _make_nf4(model, settings, resolve_dtype(settings.compute_dtype, hardware), stacks)
    made: CausalModel = model
    return made


def fill(model: nn.Module) -> None:
    """Put the parameters and buffers of an outline on the CPU: numbers as one that takes the place of all.

    bitsandbytes reads codes by their address, so each of these tensors has all its bytes; they share their memory.
    """
    codes = [one for one in (*model.parameters(), *model.buffers()) if one.is_meta and not one.is_floating_point()]
    zeros = torch.from_numpy(np.zeros(max((one.nbytes for one in codes), default=0), dtype=np.uint8))  # lazily there
    made: dict[int, Any] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    if id(tensor) not in made:
                        if tensor.is_floating_point():
                            value = torch.full((), VALUE).to(tensor.dtype).expand(tensor.shape)
                        else:
                            value = zeros[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                        is_parameter = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = (
                            nn.Parameter(value, requires_grad=tensor.requires_grad) if is_parameter else value
                        )
                        vars(made[id(tensor)]).update(vars(tensor))
                    tensors[name] = made[id(tensor)]


def _make_nf4(model: CausalModel, settings: ModelSettings, computed: torch.dtype, stacks: set[str]) -> None:
    matrices = quantised_matrices(model)
    shapes = {name: one.shape for name, one in model.named_parameters() if name in matrices | stacks}
    dtype = model.dtype
    make_quantized(model, Quantised(matrices, stacks, computed, settings.double_quantization))
    states = {}
    for name, shape in shapes.items():
        size, count = (shape, 1) if name in matrices else (shape[1:], shape[0])
        scales = torch.full((-(-size.numel() // BLOCK),), VALUE)
        state = state_of_scales(scales, size, dtype, settings.double_quantization)
        states[name] = [state] * count
    use_states(model, states, computed)


def _make_int8(model: Any) -> None:
    from loratune.model.weights.int8_linear import Int8Linear  # runs bitsandbytes

    kept = kept_in_16_bits(model)
    for name in [name.removesuffix(".weight") for name in quantised_matrices(model)]:
        if name in kept:
            continue
        path, _, attribute = name.rpartition(".")
        parent = model.get_submodule(path)
        layer: Any = getattr(parent, attribute)
        # Without a threshold: how many columns are computed in 16 bits depends on values.
        made = Int8Linear(
            layer.in_features, layer.out_features, layer.bias is not None, False, threshold=0.0, device="meta"
        )
        codes = torch.zeros((), dtype=torch.int8).expand(layer.weight.shape)
        made.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False)
        made.weight.CB, made.weight.SCB = codes, torch.zeros(layer.out_features)
        made.bias = layer.bias
        setattr(parent, attribute, made)
    model.is_loaded_in_8bit = True
