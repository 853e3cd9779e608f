"""What each layer of a model keeps of previous tokens during decoding, by the cache that transformers makes for it."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import DynamicCache
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from loratune.model.architecture.structure import layer_count, text_config
from loratune.protocols import ModelConfig

# Exact classes: one that inherits from these keeps more.
_WITH_STATES = (
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)
_WITH_KEYS = (DynamicLayer, DynamicSlidingWindowLayer, *_WITH_STATES[1:])


class LayerMemory(NamedTuple):
    """What a layer keeps."""

    has_keys: bool
    """Keys and values of tokens."""
    has_states: bool
    """States that stand for all previous tokens, such as those of linear attention and of convolutions."""
    window: int | None
    """Number of tokens whose keys and values it keeps; None for all."""
    other: str | None
    """transformers' name of something else."""


def layer_memories(config: ModelConfig) -> list[LayerMemory]:
    """What each layer keeps, in order."""
    try:
        return [_memory(layer) for layer in DynamicCache(config=text_config(config)).layers]
    except KeyError as unknown:  # a kind of layers for which transformers has no cache
        return [LayerMemory(False, False, None, other=str(unknown.args[0]))] * layer_count(config)


def has_states(config: ModelConfig) -> bool:
    """Whether some layer has states, of which no part stands for a part of the tokens."""
    return any(memory.has_states for memory in layer_memories(config))


def _memory(layer: Any) -> LayerMemory:
    kind = type(layer)
    is_known = kind in (*_WITH_KEYS, *_WITH_STATES, DummyLayer)
    return LayerMemory(
        has_keys=kind in _WITH_KEYS,
        has_states=kind in _WITH_STATES,
        window=getattr(layer, "sliding_window", None) if kind in _WITH_KEYS else None,
        other=None if is_known else kind.__name__,
    )
