"""The parts and sizes of a causal language model, from the model itself or its config."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any


class LayerState(Enum):
    """The state that a layer keeps of previous tokens during decoding."""

    ALL_TOKENS = "keys and values of every token"
    WINDOW = "keys and values of the newest tokens"
    OTHER = "something else, such as the state of linear attention"


# transformers' names of the layer types with keys and values. Every other type has its own kind of state, which the
# decoder does not support.
ATTENDING = {"full_attention": LayerState.ALL_TOKENS, "sliding_attention": LayerState.WINDOW}


def causal_model(model: Any) -> Any:
    """Return the causal language model without PEFT's wrapper."""
    # isinstance would need PEFT, which takes seconds to import and is not needed for a plain model.
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(model: Any) -> Any:
    """Return the module that computes the last hidden states from token ids.

    Args:
        model: a causal language model, with or without PEFT's wrapper.
    """
    causal = causal_model(model)
    found = causal.get_decoder()
    return causal.base_model if found is causal else found


def output_layer(model: Any) -> Any:
    """Return the module that computes logits from the last hidden states.

    Args:
        model: a causal language model, with or without PEFT's wrapper.
    """
    return causal_model(model).get_output_embeddings()


def text_config(config: Any) -> Any:
    """Return the language model's part of a config; the config itself if it is not nested."""
    return config.get_text_config(decoder=True)


def text_values(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Apply `text_config` to the contents of a config.json."""
    nested = values.get("text_config")
    return nested if isinstance(nested, Mapping) else values


def layer_count(config: Any) -> int:
    return int(text_config(config).num_hidden_layers)


def head_size(config: Any) -> int:
    text = text_config(config)
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def key_value_heads(config: Any) -> int:
    text = text_config(config)
    return int(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)


def layer_kinds(config: Any) -> list[str]:
    """Return transformers' type of each layer, in order."""
    text = text_config(config)
    return list(getattr(text, "layer_types", None) or ["full_attention"] * layer_count(config))


def layer_states(config: Any) -> list[LayerState]:
    """Return the kind of state of each layer, in order."""
    return [ATTENDING.get(kind, LayerState.OTHER) for kind in layer_kinds(config)]
