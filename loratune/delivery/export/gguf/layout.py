"""How a model of a known architecture is laid out in a GGUF file: its describing keys, its tensors and their names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from loratune.errors import Exit, LoratuneError
from loratune.model.config import load_config

# Mistral's weights and computation are Llama's, and GGUF has one architecture for both.
ARCHITECTURES = {"qwen2": "qwen2", "qwen3": "qwen3", "llama": "llama", "mistral": "llama"}
MODULES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER_MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
YARN_DEFAULTS = {"truncate": True, "mscale": None, "mscale_all_dim": None, "attention_factor": None}


class NotForGgufError(LoratuneError):
    """A model or tokenizer that loratune cannot state in GGUF, and llama.cpp's own converter perhaps can."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the GGUF file.

    `source` names it in the model's files; `values` are given for one that is computed. `rope_heads`, if not 0, is the
    number of heads whose rows change places.
    """

    name: str
    shape: tuple[int, ...]
    source: str = ""
    values: torch.Tensor | None = None
    rope_heads: int = 0


def read_config(model: Path) -> Any:
    """The model's config with defaults filled in.

    Raises:
        LoratuneError: the architecture, or a part of its computation, that GGUF's programs would not carry out.
    """
    config = load_config(model)
    if config.model_type not in ARCHITECTURES:
        raise _unknown(model, f"model_type {config.model_type!r}")
    if config.hidden_act != "silu":
        raise _unknown(model, f"hidden_act {config.hidden_act!r}")
    if config.model_type == "qwen2" and head_size(config) * config.num_attention_heads != config.hidden_size:
        raise _unknown(model, f"head_dim {config.head_dim} in a qwen2 model")
    windows = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    if window is not None and "sliding_attention" in windows and window < config.max_position_embeddings:
        raise _unknown(model, f"sliding_window {window}")
    rope = config.rope_parameters
    if rope["rope_type"] not in ("default", "linear", "yarn", "llama3"):
        raise _unknown(model, f"rope_type {rope['rope_type']!r}")
    odd = [key for key, usual in YARN_DEFAULTS.items() if rope.get(key, usual) != usual]
    if odd or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _unknown(model, f"rope_parameters with {odd[0] if odd else 'partial_rotary_factor'}")
    return config


def _unknown(model: Path, what: str) -> NotForGgufError:
    return NotForGgufError(
        f"{model}/config.json: {what} cannot be exported to GGUF here; try llama.cpp's convert_hf_to_gguf.py",
        Exit.MODEL,
    )


def head_size(config: Any) -> int:
    """Width of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def describe(config: Any) -> dict[str, str | int | float]:
    """The keys that describe the architecture; integers are uint32 and floats float32 in the file."""
    rope = config.rope_parameters
    keys: dict[str, str | int | float] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_size(config),
        "attention.value_length": head_size(config),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_size(config),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] in ("linear", "yarn"):
        keys["rope.scaling.type"] = rope["rope_type"]
        keys["rope.scaling.factor"] = float(rope["factor"])
    if rope["rope_type"] == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        keys["rope.scaling.yarn_beta_fast"] = float(rope.get("beta_fast") or 32)
        keys["rope.scaling.yarn_beta_slow"] = float(rope.get("beta_slow") or 1)
    return {f"{ARCHITECTURES[config.model_type]}.{name}": value for name, value in keys.items()}


def plan_tensors(config: Any) -> list[PlannedTensor]:
    """The tensors of the file, in the model's order, as the model's own code says which there are."""
    with torch.device("meta"):
        weights = AutoModelForCausalLM.from_config(config).state_dict()
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)  # programs take the embedding where there is no output
    planned = [_plan_tensor(config, name, tuple(weight.shape)) for name, weight in weights.items()]
    if config.rope_parameters["rope_type"] == "llama3":
        factors = _llama3_factors(config)
        planned.append(PlannedTensor("rope_freqs.weight", tuple(factors.shape), values=factors))
    return planned


def _plan_tensor(config: Any, name: str, shape: tuple[int, ...]) -> PlannedTensor:
    module, _, kind = name.rpartition(".")
    if not module.startswith("model.layers."):
        return PlannedTensor(f"{MODULES[module]}.{kind}", shape, name)
    layer, _, part = module.removeprefix("model.layers.").partition(".")
    # Llama's GGUF rotates neighbouring elements of a head, transformers an element of each half.
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    rope_heads = heads.get(part, 0) if ARCHITECTURES[config.model_type] == "llama" else 0
    return PlannedTensor(f"blk.{layer}.{LAYER_MODULES[part]}.{kind}", shape, name, rope_heads=rope_heads)


def pair_rotated_rows(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Set the two rows of each head that are rotated together side by side.

    Args:
        tensor: (heads × head size, …), in each head first all first elements of the pairs, then all second ones.
        heads: how many heads it holds.
    """
    halves = tensor.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def _llama3_factors(config: Any) -> torch.Tensor:
    """What each frequency is divided by, float32, one for each pair of a head's elements."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = head_size(config)
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    frequencies = torch.exp(-exponents * math.log(config.rope_parameters["rope_theta"]))
    factors: torch.Tensor = frequencies / scaled
    return factors.float()
