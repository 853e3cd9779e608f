"""Describes a model's architecture by the keys of a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from loratune.delivery.export.gguf.architectures import ARCHITECTURES, Architecture, architecture_name
from loratune.delivery.export.gguf.layout import PlannedTensor
from loratune.delivery.export.gguf.refusal import not_for_gguf
from loratune.model.architecture.structure import (
    delta_net,
    head_size,
    key_value_heads,
    layer_count,
    layer_kinds,
    text_config,
)
from loratune.model.config import load_config
from loratune.protocols import ModelConfig, TextConfig

YARN_DEFAULTS = {"truncate": True, "mscale": None, "mscale_all_dim": None, "attention_factor": None}
EXPERT_KEYS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""GGUF's key → transformers' key, for a mixture."""
STATED_KEYS = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
"""GGUF's key → transformers' key, of the same meaning."""
EPSILONS = ("rms_norm_eps", "norm_eps")
"""transformers' keys of the same meaning."""
AXES = [11, 11, 10]
"""Rotated pairs of time, height and width where a config does not say it, as transformers computes them."""


def read_config(model: Path) -> ModelConfig:
    """The model's config with defaults filled in.

    Raises:
        LoratuneError: programs for GGUF do not support the architecture or a part of its computation.
    """
    whole = load_config(model)
    name = architecture_name(whole)
    if name not in ARCHITECTURES:
        raise not_for_gguf(f"{model}/config.json", f"model_type {whole.model_type!r}")
    config, architecture = text_config(whole), ARCHITECTURES[name]
    if found := _not_computed(config, architecture):
        raise not_for_gguf(f"{model}/config.json", found)
    return whole


def _not_computed(config: TextConfig, architecture: Architecture) -> str | None:
    """Return what llama.cpp would compute otherwise."""
    stated = (getattr(config, name, None) for name in ("hidden_act", "hidden_activation"))
    activation = next(filter(None, stated), architecture.activation)  # one that no config states is always the same
    if activation != architecture.activation:
        return f"hidden_act {activation!r}"
    own_size = head_size(config) * config.num_attention_heads != config.hidden_size
    if own_size and not architecture.has_own_head_size:
        return f"head_dim {head_size(config)} in a {config.model_type} model"
    if found := _unusual_attention(config, architecture):
        return found
    normalised = getattr(config, "norm_topk_prob", architecture.normalises_experts)
    if normalised != architecture.normalises_experts:
        return f"norm_topk_prob {normalised}"
    if delta_net(config) and _interval(config) is None:
        return "layer_types with full attention at unequal distances"
    own, others = full_rope(config), config.rope_parameters.get("sliding_attention")
    if others and (others["rope_type"], others["rope_theta"]) != ("default", architecture.window_base):
        return f"rope_parameters of sliding_attention with {others['rope_theta']}"
    return _unusual_rope(own, architecture)


def _unusual_attention(config: TextConfig, architecture: Architecture) -> str | None:
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
        if value := getattr(config, key, None):
            return f"{key} {value}"
    scale = getattr(config, "query_pre_attn_scalar", None)
    if scale is not None and scale != attention_scale(config):
        return f"query_pre_attn_scalar {scale}"
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    if architecture.window_interval is not None:
        windows = [number % architecture.window_interval != 0 for number in range(1, len(kinds) + 1)]
        if windows != [kind == "sliding_attention" for kind in kinds]:
            return f"layer_types with full attention in other layers than each {architecture.window_interval}th"
    elif window is not None and "sliding_attention" in kinds and window < config.max_position_embeddings:
        return f"sliding_window {window}"
    return None


def attention_scale(config: TextConfig) -> int:
    """What llama.cpp takes the root of to scale a Gemma's queries: it knows the largest by its number of layers."""
    return config.hidden_size // config.num_attention_heads if layer_count(config) == 62 else head_size(config)


def full_rope(config: TextConfig) -> dict[str, Any]:
    """The rope_parameters of layers that attend to all tokens."""
    rope: dict[str, Any] = config.rope_parameters.get("full_attention") or config.rope_parameters
    return rope


def _unusual_rope(rope: dict[str, Any], architecture: Architecture) -> str | None:
    if rope["rope_type"] == "longrope" and architecture.scales_long:
        return None
    if rope["rope_type"] not in ("default", "linear", "yarn", "llama3"):
        return f"rope_type {rope['rope_type']!r}"
    odd = [key for key, usual in YARN_DEFAULTS.items() if rope.get(key, usual) != usual]
    if odd:
        return f"rope_parameters with {odd[0]}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and not architecture.rotates_parts:
        return "rope_parameters with partial_rotary_factor"
    return None


def _interval(config: TextConfig) -> int | None:
    """Return n if every n-th layer attends and no other does."""
    kinds = layer_kinds(config)
    attending = [number for number, kind in enumerate(kinds, 1) if kind == "full_attention"]
    first = attending[0] if attending else len(kinds) + 1
    return first if attending == list(range(first, len(kinds) + 1, first)) else None


def describe(config: ModelConfig, tensors: Sequence[PlannedTensor]) -> dict[str, Any]:
    """The keys that describe the architecture; integers are uint32 and floats float32 in the file.

    Args:
        config: of a whole model.
        tensors: those of the file.
    """
    text, name = text_config(config), architecture_name(config)
    rope = full_rope(text)
    keys: dict[str, Any] = {
        "vocab_size": text.vocab_size,
        "context_length": text.max_position_embeddings,
        "embedding_length": text.hidden_size,
        "block_count": layer_count(text),
        "feed_forward_length": _feed_forward_length(text, tensors),
        "attention.head_count": text.num_attention_heads,
        "attention.head_count_kv": _key_value_heads(text),
        "attention.key_length": head_size(text),
        "attention.value_length": head_size(text),
        "attention.layer_norm_rms_epsilon": next(float(getattr(text, key)) for key in EPSILONS if hasattr(text, key)),
        "rope.dimension_count": int(head_size(text) * rope.get("partial_rotary_factor", 1.0)),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] in ("linear", "yarn"):
        keys["rope.scaling.type"] = rope["rope_type"]
        keys["rope.scaling.factor"] = float(rope["factor"])
    if rope["rope_type"] in ("yarn", "longrope"):
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if rope["rope_type"] == "longrope":
        _, keys["rope.scaling.attn_factor"] = ROPE_INIT_FUNCTIONS["longrope"](text, torch.device("cpu"))
    if rope["rope_type"] == "yarn":
        keys["rope.scaling.yarn_beta_fast"] = float(rope.get("beta_fast") or 32)
        keys["rope.scaling.yarn_beta_slow"] = float(rope.get("beta_slow") or 1)
    if ARCHITECTURES[name].window_interval is not None:
        keys["attention.sliding_window"] = getattr(text, "sliding_window", None)
    if ARCHITECTURES[name].names_axes:
        axes = rope.get("mrope_section") or AXES
        keys["rope.dimension_sections"] = [*axes, *[0] * (4 - len(axes))]
    if ARCHITECTURES[name].normalises_experts is not None:
        keys |= {key: getattr(text, own, None) for key, own in EXPERT_KEYS.items()}
    keys |= _state_keys(text)
    return {f"{name}.{key}": value for key, value in keys.items() if value is not None}


def _feed_forward_length(config: TextConfig, tensors: Sequence[PlannedTensor]) -> int | None:
    """Inputs of the last matrix of an MLP, which may not be what the config states; if all are mixtures, that."""
    sizes = (tensor.shape[-1] for tensor in tensors if tensor.name.endswith(".ffn_down.weight"))
    return next(sizes, getattr(config, "intermediate_size", None))


def _key_value_heads(config: TextConfig) -> int | list[int]:
    """The number of heads; of each layer, if some are convolutions, which have none."""
    kinds, heads = layer_kinds(config), key_value_heads(config)
    return [heads if kind == "full_attention" else 0 for kind in kinds] if "conv" in kinds else heads


def _state_keys(config: TextConfig) -> dict[str, int | None]:
    """Keys of layers with a state: convolutions, and gated delta nets, whose keys are named as Mamba's."""
    net = delta_net(config)
    if net is None:
        return {"shortconv.l_cache": getattr(config, "conv_L_cache", None)}
    return {
        "ssm.conv_kernel": net.kernel,
        "ssm.state_size": net.key_size,
        "ssm.group_count": net.key_heads,
        "ssm.time_step_rank": net.value_heads,
        "ssm.inner_size": net.value_heads * net.value_size,
        "full_attention_interval": _interval(config),
    }
