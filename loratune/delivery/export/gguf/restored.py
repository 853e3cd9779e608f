"""Reads Qwen3-Next from a GGUF file, which transformers cannot.

It follows llama.cpp's graph, and has no function in common with the writer, which it checks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import CONFIG_MAPPING
from transformers.initialization import no_init_weights

from loratune.delivery.export.gguf.keys import EXPERT_KEYS, STATED_KEYS
from loratune.errors import Exit, LoratuneError, reason_of
from loratune.model.architecture.gguf_names import GgufName, gguf_names
from loratune.model.architecture.structure import DeltaNet, delta_net
from loratune.model.config import auto_class
from loratune.protocols import CausalModel, ModelConfig

RESTORED = {"qwen3next": "qwen3_next"}
"""GGUF's architecture → transformers' model_type, of what is read here."""
# GGUF's name under rope.scaling → the name in rope_parameters.
SCALING = {
    "type": "rope_type",
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}


def stated_keys(reader: Any) -> dict[str, Any]:
    """The values that a file states, without the architecture's name in front."""
    return {key.partition(".")[2]: field.contents() for key, field in reader.fields.items()}


def rope_parameters(stated: dict[str, Any]) -> dict[str, Any]:
    """transformers' rope_parameters, of a file's keys."""
    scaling = {
        ours: stated[f"rope.scaling.{theirs}"] for theirs, ours in SCALING.items() if f"rope.scaling.{theirs}" in stated
    }
    part = stated["rope.dimension_count"] / stated["attention.key_length"]
    rope = {"rope_type": "default", "rope_theta": stated["rope.freq_base"], **scaling}
    return rope if part == 1 else {**rope, "partial_rotary_factor": part}


def restore(file: Path) -> CausalModel:
    """The model of a file in float32, in memory and in eval mode.

    Args:
        file: a GGUF file of an architecture in RESTORED.

    Raises:
        LoratuneError: keys and tensors do not make a model.
    """
    try:
        return _restored(file)
    except Exception as error:  # transformers and torch raise many types for bad values
        raise LoratuneError(
            f"{file.name}: its tensors do not have the shapes that its keys state ({reason_of(error)})", Exit.MODEL
        ) from error


def _restored(file: Path) -> CausalModel:
    reader = gguf.GGUFReader(file)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    architecture = reader.fields["general.architecture"].contents()
    config = _stated_config(reader, RESTORED[architecture], is_tied="output.weight" not in stored)
    with no_init_weights():
        model: CausalModel = auto_class(type(config)).from_config(config, dtype=torch.float32)
    parameters, net = model.state_dict(), delta_net(config)
    assert net is not None

    def read(name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(gguf.dequantize(stored[name].data, stored[name].tensor_type)))

    with torch.no_grad():
        for parameter, names in gguf_names(model, architecture).items():
            if names[0].kind == "OUTPUT" and config.tie_word_embeddings:
                continue
            parts = [_values(name, read, net) for name in names]
            values = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
            parameters[parameter].copy_(values.view(parameters[parameter].shape))
    model.tie_weights()
    return model.eval()


def _stated_config(reader: Any, model_type: str, is_tied: bool) -> ModelConfig:
    stated = stated_keys(reader)
    interval, heads = stated["full_attention_interval"], stated["ssm.time_step_rank"]
    kinds = ("linear_attention", "full_attention")
    values = {own: stated[key] for key, own in (STATED_KEYS | EXPERT_KEYS).items()}
    values |= {
        "layer_types": [kinds[number % interval == 0] for number in range(1, stated["block_count"] + 1)],
        "linear_conv_kernel_dim": stated["ssm.conv_kernel"],
        "linear_key_head_dim": stated["ssm.state_size"],
        "linear_num_key_heads": stated["ssm.group_count"],
        "linear_num_value_heads": heads,
        "linear_value_head_dim": stated["ssm.inner_size"] // heads,
        "rope_parameters": rope_parameters(stated),
        "norm_topk_prob": True,
        "tie_word_embeddings": is_tied,
    }
    config: ModelConfig = CONFIG_MAPPING[model_type](**values)
    return config


def _values(name: GgufName, read: Any, net: DeltaNet) -> torch.Tensor:
    """Return the values of a parameter, or of one of the matrices joined in it."""
    if name.kind == "SSM_IN":
        # Of each key head in turn: query, key, values, gates.
        keys = net.key_heads * net.key_size
        query, key, value = read(name.as_kind("ATTN_QKV")).split([keys, keys, net.value_heads * net.value_size])
        parts = (query, key, value, read(name.as_kind("ATTN_GATE")))
        return torch.cat([part.unflatten(0, (net.key_heads, -1)) for part in parts], dim=1).flatten(0, 1)
    values: torch.Tensor = read(name.name)
    if name.kind == "SSM_A":  # the decay, of which the model holds the logarithm
        return (-values).log()
    if name.kind.endswith("NORM") and name.kind != "SSM_NORM":  # the factor, of which the model holds what exceeds 1
        return values - 1
    return values
