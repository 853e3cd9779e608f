"""Makes the model of a GGUF file again by undoing what was changed on writing.

transformers' reader is independent of the writer, and is preferred. This one serves architectures that transformers
does not read, and separates a wrong file from rounding: where the type of the weights sends tokens to other experts,
logits differ a lot though every value is right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import CONFIG_MAPPING
from transformers.initialization import no_init_weights

from loratune.delivery.export.gguf.architectures import ARCHITECTURES, letters
from loratune.delivery.export.gguf.keys import EXPERT_KEYS, STATED_KEYS
from loratune.delivery.export.gguf.layout import plan_tensors
from loratune.model.architecture.structure import text_config
from loratune.model.config import auto_class
from loratune.protocols import CausalModel, ModelConfig


def stated_keys(reader: Any) -> dict[str, Any]:
    """The values that a file states, without the architecture's name in front."""
    return {key.partition(".")[2]: field.contents() for key, field in reader.fields.items()}


def stated_config(file: Path) -> ModelConfig:
    """The config that a file's keys describe, of an architecture with gated delta nets."""
    reader = gguf.GGUFReader(file)
    stated = stated_keys(reader)
    architecture = reader.fields["general.architecture"].contents()
    kind = {letters(kind): kind for kind in CONFIG_MAPPING}[letters(architecture)]
    interval, heads = stated["full_attention_interval"], stated["ssm.time_step_rank"]
    kinds = ("linear_attention", "full_attention")
    values = {own: stated[key] for key, own in (STATED_KEYS | EXPERT_KEYS).items() if key in stated}
    values |= {
        "layer_types": [kinds[number % interval == 0] for number in range(1, stated["block_count"] + 1)],
        "linear_conv_kernel_dim": stated["ssm.conv_kernel"],
        "linear_key_head_dim": stated["ssm.state_size"],
        "linear_num_key_heads": stated["ssm.group_count"],
        "linear_num_value_heads": heads,
        "linear_value_head_dim": stated["ssm.inner_size"] // heads,
        "rope_parameters": rope_parameters(stated),
        "norm_topk_prob": ARCHITECTURES[architecture].normalises_experts,
        "tie_word_embeddings": "output.weight" not in {tensor.name for tensor in reader.tensors},
    }
    config: ModelConfig = CONFIG_MAPPING[kind](**values)
    return config


# GGUF's name under rope.scaling → the name in rope_parameters.
SCALING = {
    "type": "rope_type",
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}


def rope_parameters(stated: dict[str, Any]) -> dict[str, Any]:
    """transformers' rope_parameters, of a file's keys."""
    scaling = {
        ours: stated[f"rope.scaling.{theirs}"] for theirs, ours in SCALING.items() if f"rope.scaling.{theirs}" in stated
    }
    part = stated["rope.dimension_count"] / stated["attention.key_length"]
    rope = {"rope_type": "default", "rope_theta": stated["rope.freq_base"], **scaling}
    return rope if part == 1 else {**rope, "partial_rotary_factor": part}


def restore(file: Path, config: ModelConfig) -> CausalModel:
    """The model of a file in float32, in memory and in eval mode.

    Args:
        file: the GGUF file, whose tensors are those of the config.
        config: of the model; parameters outside of its language model are left without values.
    """
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    with no_init_weights():
        model: CausalModel = auto_class(type(config)).from_config(config, dtype=torch.float32)
    parameters = model.state_dict()
    with torch.no_grad():
        for tensor in plan_tensors(config):
            if not tensor.source:
                continue
            found = stored[tensor.name]
            values = np.array(gguf.dequantize(found.data, found.tensor_type))
            tensor.change.undo(torch.from_numpy(values), parameters[tensor.source])
    if text_config(config).tie_word_embeddings:
        model.tie_weights()
    return model.eval()
