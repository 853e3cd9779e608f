"""Describes models for GGUF: metadata keys, tensors and their names."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from loratune.errors import Exit, LoratuneError
from loratune.model.architecture.families import FAMILIES
from loratune.model.architecture.structure import head_size, key_value_heads, layer_count, text_config
from loratune.model.architecture.vocabulary import vocabulary_of
from loratune.model.config import empty_model, load_config
from loratune.protocols import TextConfig

YARN_DEFAULTS = {"truncate": True, "mscale": None, "mscale_all_dim": None, "attention_factor": None}


class NotForGgufError(LoratuneError):
    """A model or tokenizer that loratune cannot represent in GGUF; llama.cpp's own converter may."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the GGUF file.

    `source` is the name of the model's parameter; `values` are set for a computed tensor. `rope_heads`, if not 0, is
    the number of heads whose rows are reordered.
    """

    name: str
    shape: tuple[int, ...]
    source: str = ""
    values: torch.Tensor | None = None
    rope_heads: int = 0


def read_config(model: Path) -> TextConfig:
    """The model's config with defaults filled in.

    Raises:
        LoratuneError: programs for GGUF do not support the architecture or a part of its computation.
    """
    whole = load_config(model)
    if whole.model_type not in FAMILIES or FAMILIES[whole.model_type].gguf is None:
        raise _unknown(model, f"model_type {whole.model_type!r}")
    config = text_config(whole)
    if config.hidden_act != "silu":
        raise _unknown(model, f"hidden_act {config.hidden_act!r}")
    if config.model_type == "qwen2" and head_size(config) * config.num_attention_heads != config.hidden_size:
        raise _unknown(model, f"head_dim {head_size(config)} in a qwen2 model")
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


def architecture_of(config: TextConfig) -> str:
    """GGUF's name of a model's architecture."""
    return FAMILIES[config.model_type].gguf or ""


def describe(config: TextConfig) -> dict[str, str | int | float]:
    """The keys that describe the architecture; integers are uint32 and floats float32 in the file."""
    rope = config.rope_parameters
    keys: dict[str, str | int | float] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": layer_count(config),
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": key_value_heads(config),
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
    return {f"{architecture_of(config)}.{name}": value for name, value in keys.items()}


def plan_tensors(config: TextConfig) -> list[PlannedTensor]:
    """The tensors of the file, in the model's order, as the model's own code says which there are."""
    weights = empty_model(config).state_dict()
    if config.tie_word_embeddings:
        weights.pop(vocabulary_of(weights).head, None)  # without an output tensor, programs use the embedding
    names = _gguf_names(config)
    planned = [_plan_tensor(config, names, name, tuple(weight.shape)) for name, weight in weights.items()]
    if config.rope_parameters["rope_type"] == "llama3":
        factors = _llama3_factors(config)
        planned.append(PlannedTensor("rope_freqs.weight", tuple(factors.shape), values=factors))
    return planned


def _gguf_names(config: TextConfig) -> Any:
    """The gguf package's own table of a family's names."""
    import gguf  # an extra, without which the rest of this module is of use

    by_name = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(by_name[architecture_of(config)], layer_count(config))


def _plan_tensor(config: TextConfig, names: Any, source: str, shape: tuple[int, ...]) -> PlannedTensor:
    module, _, kind = source.rpartition(".")
    name = names.get_name(module)
    # Llama's GGUF rotates adjacent elements of a head; transformers rotates elements of its two halves.
    heads = {"attn_q": config.num_attention_heads, "attn_k": key_value_heads(config)}
    rope_heads = heads.get(name.rpartition(".")[2], 0) if architecture_of(config) == "llama" else 0
    return PlannedTensor(f"{name}.{kind}", shape, source, rope_heads=rope_heads)


def pair_rotated_rows(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of each head so that the two rows that are rotated together are adjacent.

    Args:
        tensor: (heads × head size, …); in each head, all first elements of the pairs precede all second ones.
        heads: number of heads.
    """
    halves = tensor.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def _llama3_factors(config: TextConfig) -> torch.Tensor:
    """What each frequency is divided by, float32, one for each pair of a head's elements."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = head_size(config)
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    frequencies = torch.exp(-exponents * math.log(config.rope_parameters["rope_theta"]))
    factors: torch.Tensor = frequencies / scaled
    return factors.float()
