"""The parts and sizes of a causal language model, from the model itself or its config."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeGuard

from loratune.protocols import AdaptedModel, CausalModel, Decoder, ModelConfig, TextConfig


def is_adapted(model: CausalModel) -> TypeGuard[AdaptedModel]:
    """Whether a model is PEFT's wrapper of one."""
    # Not by its class: importing PEFT takes seconds, and a model alone does without it.
    return hasattr(model, "get_base_model")


def causal_model(model: CausalModel) -> CausalModel:
    """The causal language model itself, without PEFT's wrapper around it."""
    return model.get_base_model() if is_adapted(model) else model


def decoder_of(model: CausalModel) -> Decoder:
    """The module that makes the last states of token ids.

    Args:
        model: a causal language model, with or without PEFT's wrapper.
    """
    causal = causal_model(model)
    found = causal.get_decoder()
    if found is causal:
        found = causal.base_model
    if found is causal:  # its class names a part of a larger model as its base
        embedding = causal.get_input_embeddings()
        found = next(part for part in causal.children() if any(module is embedding for module in part.children()))
    decoder: Decoder = found
    return decoder


def output_layer(model: CausalModel) -> Any:
    """The module that makes logits of the last states.

    Args:
        model: a causal language model, with or without PEFT's wrapper.
    """
    return causal_model(model).get_output_embeddings()


def language_parts(model: CausalModel) -> tuple[str, str]:
    """The names of decoder and output layer, each followed by a dot; every other parameter is of something else."""
    paths = {id(module): name for name, module in model.named_modules()}
    return f"{paths[id(decoder_of(model))]}.", f"{paths[id(output_layer(model))]}."


def tensors_apart(model: CausalModel, names: Iterable[str]) -> list[str]:
    """Return the parameters, and tensors of the files that are none, that take no part in writing text.

    Such are the weights that read images, and what transformers' class itself does not load from the files.

    Args:
        model: a model with or without values.
        names: of parameters and tensors.
    """
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    inside = language_parts(model)
    outside = {name for name in model.state_dict() if not name.startswith(inside)}
    return [name for name in names if name in outside or any(re.search(pattern, name) for pattern in ignored)]


def text_config(config: ModelConfig) -> TextConfig:
    """The part of a config that describes the language model: the config itself where nothing else is in it."""
    return config.get_text_config(decoder=True)


def text_values(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Apply `text_config` to the contents of a config.json."""
    nested = values.get("text_config")
    return nested if isinstance(nested, Mapping) else values


def text_value(values: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """What a config.json says of the language model: in its part, or else beside it."""
    return text_values(values).get(key, values.get(key, default))


def with_text_values(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that says something else of the language model, wherever it has said it before.

    Args:
        values: its contents.
        changes: a key that stands nowhere yet is set in the language model's part.
    """
    text = text_values(values)
    own = {key: value for key, value in changes.items() if key in text or key not in values}
    if text is values:
        return {**values, **own}
    return {**values, **{key: changes[key] for key in changes if key in values}, "text_config": {**text, **own}}


def layer_count(config: ModelConfig) -> int:
    """How many layers the language model of a config has."""
    return int(text_config(config).num_hidden_layers)


def head_size(config: ModelConfig) -> int:
    """Width of an attention head."""
    text = text_config(config)
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def key_value_heads(config: ModelConfig) -> int:
    """How many heads of keys an attention layer has, and of values."""
    text = text_config(config)
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)


def rotates_by_longest(config: ModelConfig) -> bool:
    """Whether the rotary angles of a row depend on the longest row of its batch, as in dynamic scaling."""
    given = getattr(text_config(config), "rope_parameters", None) or {}
    # One for all layers, or one for each kind of layers.
    every = [given, *(one for one in given.values() if isinstance(one, Mapping))]
    kinds = [str(one.get("rope_type")) for one in every]
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)


def layer_kinds(config: ModelConfig) -> list[str]:
    """transformers' name of each layer's kind, in order."""
    text = text_config(config)
    return list(getattr(text, "layer_types", None) or ["full_attention"] * layer_count(config))


class DeltaNet(NamedTuple):
    """Sizes of a model's gated delta nets."""

    key_heads: int
    value_heads: int
    key_size: int
    """Of a head."""
    value_size: int
    """Of a head."""
    kernel: int
    """Tokens that the convolution before it sees."""


def delta_net(config: ModelConfig) -> DeltaNet | None:
    """Return the sizes of the gated delta nets of a config's language model, if it has any."""
    names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    sizes = [getattr(text_config(config), f"linear_{name}", None) for name in names]
    found = [int(size) for size in sizes if size]
    return DeltaNet(*found) if len(found) == len(names) else None
