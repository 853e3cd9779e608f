"""The parts and sizes of a causal language model, from the model itself or its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

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
    decoder: Decoder = causal.base_model if found is causal else found
    return decoder


def output_layer(model: CausalModel) -> Any:
    """The module that makes logits of the last states.

    Args:
        model: a causal language model, with or without PEFT's wrapper.
    """
    return causal_model(model).get_output_embeddings()


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
