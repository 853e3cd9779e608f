"""Decides whether a LoRA layer is just base and branch, from a state that is quick to compare at each call."""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.lora import Linear
from torch import nn

from loratune.model.kernels.few_rows import takes_few_rows
from loratune.model.weights.dequantised import is_unrounded


class LayerState(NamedTuple):
    """Everything that the decision depends on: it is made anew when a state differs, so that no change is overlooked.

    Weights are given by their identity, because tensors do not compare to a truth value.
    """

    adapter: str
    base: Any
    dropout: Any
    down: Any
    """The module of A."""
    up: Any
    """The module of B."""
    weights: tuple[int, int]
    dtypes: tuple[Any, Any]
    has_bias: bool
    """Whether B has one."""
    base_weight: tuple[type, bool, bool]
    """Its class, whether it is trained, and whether it is in bitsandbytes' training format."""
    base_dtype: Any
    """That the base computes in; None for LLM.int8, and for a 4-bit layer that takes its first input's."""
    has_additions: bool
    """Whether a module has hooks or another forward than its class's."""


def base_classes() -> dict[type, tuple[type, ...]]:
    """Return PEFT's layer class → known classes of its base layer."""
    return _with_quantised() if is_bnb_4bit_available() else {Linear: (nn.Linear,)}


@functools.cache
def _with_quantised() -> dict[type, tuple[type, ...]]:
    layers = importlib.import_module("peft.tuners.lora.bnb")
    rows = importlib.import_module("loratune.model.weights.quantized_rows")
    int8 = importlib.import_module("loratune.model.weights.int8_linear")
    trained_bias = importlib.import_module("loratune.model.weights.trained_bias")
    return {
        Linear: (nn.Linear, rows.QuantizedLinear),
        layers.Linear4bit: (layers.bnb.nn.Linear4bit, trained_bias.OwnBias4bit),
        layers.Linear8bitLt: (int8.Int8Linear,),
    }


def state_of(layer: Any) -> LayerState | None:
    """Return a layer's state; None if it is not base and matrices of known classes with a single adapter in effect."""
    active = layer._active_adapter
    adapter: Any = active if isinstance(active, str) else active[0] if len(active) == 1 else None
    return None if layer._disable_adapters or layer.merged_adapters else state_with(layer, adapter)


def state_with(layer: Any, adapter: Any) -> LayerState | None:
    """Return the state with one of a layer's adapters, whether it is active or not."""
    if adapter in layer.lora_variant:
        return None
    modules = layer._modules
    base, down, up = (
        modules["base_layer"],
        modules["lora_A"]._modules.get(adapter),
        modules["lora_B"]._modules.get(adapter),
    )
    is_known = type(base) in base_classes().get(type(layer), ()) and type(down) is type(up) is nn.Linear
    if not is_known or not layer.cast_input_dtype_enabled:
        return None
    dropout = modules["lora_dropout"]._modules[adapter]
    weight, a, b = base._parameters["weight"], down._parameters["weight"], up._parameters["weight"]
    is_dense = type(base) is nn.Linear
    return LayerState(
        adapter,
        base,
        dropout,
        down,
        up,
        (id(a), id(b)),
        (a.dtype, b.dtype),
        up._parameters["bias"] is not None,
        (type(weight), weight.requires_grad, not is_dense and _trains_quantised(base)),
        weight.dtype if is_dense else base.compute_dtype,
        _has_additions(base) or _has_additions(dropout) or _has_additions(down) or _has_additions(up),
    )


def _has_additions(module: Any) -> bool:
    own = vars(module)
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks) or ("forward" in own and not (takes_few_rows(module) or is_unrounded(module)))


def _trains_quantised(base: Any) -> bool:
    if hasattr(base, "weight_in"):  # LLM.int8
        return not base.state.has_fp16_weights
    state = getattr(base._parameters["weight"], "quant_state", None) or base.quant_state
    return state is not None and not getattr(state, "packing_format_for_cpu", False)


def is_plain(state: LayerState | None) -> bool:
    """Return whether a layer is just a frozen base and the branch of its adapter."""
    if state is None or state.has_additions or state.has_bias or type(state.dropout) not in (nn.Identity, nn.Dropout):
        return False
    of_a, of_b = state.dtypes
    return _is_frozen(state) and of_a == of_b and of_a in (torch.float32, state.base_dtype)


def suits(state: LayerState, x: Any) -> bool:
    """Return whether the whole layer can compute in the dtype of x."""
    dtype = x.dtype
    has_dtypes = state.base_dtype in (dtype, None) and state.dtypes[0] in (dtype, torch.float32)
    return has_dtypes and not torch.is_autocast_enabled(x.device.type)


def _is_frozen(state: LayerState) -> bool:
    kind, is_trained, trains_quantised = state.base_weight
    return not is_trained and (trains_quantised or (type(state.base) is nn.Linear and kind is nn.Parameter))
