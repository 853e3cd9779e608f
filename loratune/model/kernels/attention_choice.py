"""Chooses how the documents of packed rows attend: once per model, with the reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from loratune.model.architecture.structure import head_size, key_value_heads, text_config
from loratune.model.base import dtype_name
from loratune.model.hardware import Hardware
from loratune.model.kernels.packed_attention import VARLEN_ATTENTION, VARLEN_TOLERANCE, use_document_attention, varlen
from loratune.model.nvidia import FLASH_CAPABILITY
from loratune.protocols import CausalModel

TRIAL = (5, 130)
"""Lengths of the trial's documents: one is longer than a kernel's block of keys."""


@dataclass(frozen=True)
class AttentionChoice:
    """The attention of a model, and why it has this one."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}" if self.reason else self.name


def choose_attention(
    model: CausalModel, hardware: Hardware, asked: str, is_packed: bool, is_tried: bool = True
) -> AttentionChoice:
    """Set the attention of a loaded model for training.

    Args:
        model: the base, as loaded.
        hardware: that it is on.
        asked: the recipe's setting.
        is_packed: whether rows hold several documents.
        is_tried: whether torch's kernel is run; else it is taken to work where the hardware suits.
    """
    loaded = str(model.config._attn_implementation)
    if not is_packed or asked not in ("auto", "sdpa"):
        return AttentionChoice(loaded, "as the recipe says" if asked != "auto" else "")
    lacking = "as the recipe says" if asked == "sdpa" else _what_varlen_lacks(model, hardware, is_tried)
    if not lacking:
        use_document_attention(model, VARLEN_ATTENTION)
        return AttentionChoice("varlen", "one kernel for all documents of a batch")
    if loaded.startswith("flash"):
        return AttentionChoice(loaded, f"one kernel for all documents of a batch; not torch's, {lacking}")
    use_document_attention(model)
    return AttentionChoice("sdpa", f"one call per document, {lacking}")


def _what_varlen_lacks(model: CausalModel, hardware: Hardware, is_tried: bool) -> str:
    """Return why torch's kernel for all documents of a row cannot be used; empty if it can."""
    if not hardware.is_gpu:
        return "without a GPU"
    if hardware.capability < FLASH_CAPABILITY:
        return f"since {hardware.name} has compute capability {hardware.capability[0]}.{hardware.capability[1]} < 8.0"
    if model.dtype not in (torch.bfloat16, torch.float16):
        return f"since the model computes in {dtype_name(model.dtype)}"
    if not getattr(model, "_supports_flash_attn", False):
        return f"since {type(model).__name__} has attention that its kernel does not know"
    if getattr(text_config(model.config), "attention_dropout", 0):
        return "since its kernel has no dropout"
    return _what_fails(model) if is_tried else ""


def _what_fails(model: CausalModel) -> str:
    """Try the kernel with the model's heads, forward and backward, and compare it with sdpa."""
    config, random = model.config, torch.Generator().manual_seed(0)
    heads, key_heads = text_config(config).num_attention_heads, key_value_heads(config)
    shapes = [(sum(TRIAL), count, head_size(config)) for count in (heads, key_heads, key_heads)]
    made = (torch.randn(shape, generator=random).to(model.device, model.dtype) for shape in shapes)
    rows = [tensor.requires_grad_() for tensor in made]
    borders = torch.tensor([0, TRIAL[0], sum(TRIAL)], dtype=torch.int32, device=model.device)
    direction = rows[0].detach()
    try:
        with torch.enable_grad():
            found = varlen(rows, borders, max(TRIAL), window=None, scaling=None)
            expected = torch.cat([_by_sdpa(*part) for part in zip(*(t.split(TRIAL) for t in rows), strict=True)])
            ours = [found, *torch.autograd.grad(found, rows, direction)]
            theirs = [expected, *torch.autograd.grad(expected, rows, direction)]
    except Exception as error:  # a kernel may raise anything; training works without it
        return f"since torch's kernel for several documents fails: {' '.join(str(error).split())[:200]}"
    same = all((own - other).norm() <= VARLEN_TOLERANCE * other.norm() for own, other in zip(ours, theirs, strict=True))
    return "" if same else "since torch's kernel for several documents gives other results"


def _by_sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention of one document, [tokens, heads, size]."""
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    output = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return output[0].transpose(0, 1)
