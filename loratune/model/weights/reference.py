"""The reference for merged and exported models: base + adapter as trained, in float32 arithmetic."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn

from loratune.model.adapter.attach import load_adapter
from loratune.model.adapter.peft_stacks import StackRows
from loratune.model.base import load_base
from loratune.model.files import weight_files
from loratune.model.from_folder import load_empty
from loratune.model.hardware import Hardware
from loratune.model.weights.dequantised import exact_linear, modules_with
from loratune.model.weights.held import is_quantised
from loratune.model.weights.mapped import load_mapped, mapped_in_float32
from loratune.model.weights.stack import stacks_of
from loratune.model.weights.tensor_files import TensorFiles
from loratune.model.weights.unpacked import keep_unpacked
from loratune.protocols import AdaptedModel, CausalModel
from loratune.recipe.sections import ModelSettings


def load_reference(settings: ModelSettings, base: Path, adapter: Path, hardware: Hardware) -> AdaptedModel:
    """PEFT's own model: the adapter's layers beside the base's, which is quantised if it was in training.

    Args:
        settings: settings of the base in training.
        base: folder of the base.
        adapter: PEFT folder.
        hardware: that it computes on.

    Raises:
        LoratuneError: the adapter does not match, or this machine cannot quantise.
    """
    if settings.quantization == "none":
        computing = load_mapped(base, device=hardware.device)
    else:
        computing = _load_quantised(settings, base, hardware)
    adapted = load_adapter(computing, adapter, keep_dtype=True)
    if hardware.is_gpu:
        _compute_updates_on(adapted, hardware.device)
    _update_stacks(adapted)
    return adapted


def _load_quantised(settings: ModelSettings, base: Path, hardware: Hardware) -> CausalModel:
    """A base in float32 arithmetic, with the quantised weights of the training, and the others as the files have them.

    The training has the others in its own dtype, in which a merged model never has them.
    """
    # Flash attention would cast to the config's type.
    exact = settings.model_copy(update={"compute_dtype": "float32", "attn_implementation": "sdpa"})
    quantized = load_base(exact, base, hardware)
    keep_unpacked(quantized)  # the packed form computes in bfloat16
    quantized.set_experts_implementation("eager")  # others take whole stacks
    _compute_buffers_in_float32(quantized, base)
    for module in modules_with(quantized, "Params4bit"):
        # bitsandbytes would dequantise to float32, as no training.
        module.forward = functools.partial(exact_linear, module)
    return mapped_in_float32(quantized, TensorFiles(weight_files(base)), hardware.device).eval()


def _compute_buffers_in_float32(model: CausalModel, base: Path) -> None:
    """Replace what transformers computes from the config, such as Gemma's scale of embeddings, in the model's dtype."""
    exact = dict(load_empty(base).named_modules())
    for path, module in model.named_modules():
        for name in module._non_persistent_buffers_set & module._buffers.keys():
            buffer = exact[path]._buffers[name]
            module._buffers[name] = None if buffer is None else buffer.to(model.device)


def _compute_updates_on(model: AdaptedModel, device: torch.device) -> None:
    """Move PEFT's matrices, which are where the mapped weights are, to a GPU.

    DoRA computes lengths from the whole of its base's weight, which is therefore lent to it there.
    """
    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        for name, module in layer.named_modules():
            held = module._parameters if name.startswith("lora_") else {}
            for attribute, values in [(attribute, values) for attribute, values in held.items() if values is not None]:
                held[attribute] = nn.Parameter(values.detach().to(device), requires_grad=False)
        if layer.lora_variant and not is_quantised(layer.get_base_layer().weight):
            layer.forward = functools.partial(_with_weight_on, device, layer.get_base_layer(), layer.forward)


def _with_weight_on(
    device: torch.device, base: Any, forward: Callable[..., torch.Tensor], *arguments: Any, **settings: Any
) -> torch.Tensor:
    mapped = base.weight
    base._parameters["weight"] = nn.Parameter(mapped.to(device), requires_grad=False)
    try:
        return forward(*arguments, **settings)
    finally:
        base._parameters["weight"] = mapped


def _update_stacks(model: AdaptedModel) -> None:
    """Add PEFT's update of a stack to each matrix that is read, since PEFT's layer computes that of the whole stack."""
    for layer in [module for module in model.modules() if isinstance(module, ParamWrapper)]:
        rows = StackRows(layer, model.active_adapter)
        stacks_of(layer.get_base_layer())[layer.parameter_name].changes.append(rows.merged_matrix)
        layer.forward = layer.base_layer.__call__
