"""The architectures of GGUF that loratune writes, and what llama.cpp computes for each without a key that says it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from loratune.delivery.export.gguf.changes import (
    Change,
    decay,
    joined_projection_rows,
    paired_rows,
    tiled_heads,
)
from loratune.extras import required
from loratune.model.architecture.families import FAMILIES
from loratune.model.architecture.structure import delta_net, head_size, key_value_heads, text_config
from loratune.protocols import ModelConfig, TextConfig

with required("GGUF", "export"):
    import gguf

Changes = dict[str, list[tuple[str, Change]]]
"""gguf's name of a kind of tensor → the kinds that are written instead, usually itself, and their values."""


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp computes an architecture."""

    changes: Callable[[TextConfig], Changes] = lambda config: {}
    normalises_experts: bool | None = None
    """Whether a router's weights for the selected are divided by their sum; None for a dense model."""
    has_own_head_size: bool = True
    """Whether the heads' width may differ from the hidden size."""
    rotates_parts: bool = False
    """Whether a part of a head's elements may be rotated alone."""
    activation: str = "silu"
    window_interval: int | None = None
    """If not None, every n-th layer attends to all tokens, and the others to a window."""
    window_base: float | None = None
    """Base of the rotary frequencies in layers with a window, if it is not that of the others."""
    scales_long: bool = False
    """Whether frequencies are divided by other factors where the context is longer than that of the pretraining."""
    names_axes: bool = False
    """Whether the file has the number of rotated pairs of each axis of an image."""


def _paired(config: TextConfig) -> Changes:
    """Llama's graph rotates adjacent elements of a head; transformers rotates elements of its two halves."""
    size = head_size(config)
    heads = {"ATTN_Q": config.num_attention_heads, "ATTN_K": key_value_heads(config)}
    return {kind: [(kind, Change(paired_rows(count * size, count)))] for kind, count in heads.items()}


def _tiled(config: TextConfig) -> Changes:
    """Qwen3.5's graph repeats keys as a whole; transformers repeats each key."""
    net = delta_net(config)
    assert net is not None
    each, heads = tiled_heads(net, net.value_size), tiled_heads(net, 1)
    mixed = Change(tiled_heads(net, net.value_size, before=2 * net.key_heads * net.key_size))
    changes = {
        "SSM_A": Change(heads, formula=decay),
        **dict.fromkeys(("SSM_DT", "SSM_ALPHA", "SSM_BETA"), Change(heads)),
        **dict.fromkeys(("ATTN_QKV", "SSM_CONV1D"), mixed),
        "ATTN_GATE": Change(each),
        "SSM_OUT": Change(each, dim=1),
    }
    return {kind: [(kind, change)] for kind, change in changes.items()}


def _apart(config: TextConfig) -> Changes:
    """Qwen3-Next's graph has the gates apart from queries, keys and values, and each of these for all heads."""
    net = delta_net(config)
    assert net is not None
    mixed, gates = joined_projection_rows(net)
    return {
        "SSM_A": [("SSM_A", Change(formula=decay))],
        "SSM_IN": [("ATTN_QKV", Change(mixed)), ("ATTN_GATE", Change(gates))],
    }


ARCHITECTURES = {
    "qwen2": Architecture(has_own_head_size=False),
    "qwen2moe": Architecture(has_own_head_size=False, normalises_experts=False),
    "qwen3": Architecture(),
    "qwen3moe": Architecture(normalises_experts=True),
    "qwen3next": Architecture(_apart, normalises_experts=True, rotates_parts=True),
    "qwen35": Architecture(_tiled, rotates_parts=True, names_axes=True),
    "qwen35moe": Architecture(_tiled, normalises_experts=True, rotates_parts=True, names_axes=True),
    "gemma3": Architecture(activation="gelu_pytorch_tanh", window_interval=6, window_base=1e4),
    "lfm2": Architecture(),
    "llama": Architecture(_paired),
    "phi3": Architecture(has_own_head_size=False, rotates_parts=True, scales_long=True),
}
"""Name in GGUF → architecture. A test writes and reads each."""


def architecture_name(config: ModelConfig) -> str:
    """GGUF's name of a model's architecture; "" if gguf knows none. It is transformers' name, spelt in another way."""
    kind = text_config(config).model_type
    if kind in FAMILIES and (stated := FAMILIES[kind].gguf):
        return stated
    spelt: dict[str, str] = {letters(name): name for name in gguf.MODEL_ARCH_NAMES.values()}
    return spelt.get(letters(kind.removesuffix("_text")), "")


def letters(name: str) -> str:
    """Return a name without what transformers and gguf spell differently."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
