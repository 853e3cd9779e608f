"""Block-diagonal causal attention: each document of a packed row attends only to itself, without a mask of the row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from loratune.multiples import round_up
from loratune.protocols import CausalModel

try:
    from torch.nn.attention.varlen import varlen_attn as varlen_attn  # the cache of the engine uses it too
except ImportError:  # before torch 2.10
    varlen_attn = None

DOCUMENT_ATTENTION = "documents"
"""Name of the attention by single documents as a model's attn_implementation."""
VARLEN_ATTENTION = "varlen_documents"
"""The same with one kernel for all documents of a row."""
VARLEN_TOLERANCE = 0.02
"""Largest relative difference of torch's kernel and sdpa in half precision."""
LONGEST_BY_PRODUCTS = 1024
"""Longer documents use torch's kernel, which saves no probabilities for the backward pass."""
QUERY_BLOCK = 128
LENGTH_UNIT = 32
"""Lengths are padded to multiples of this, because oneDNN compiles and caches a kernel per shape."""
OTHER_TERMS = ("softcap", "position_bias", "s_aux")
"""Additional score terms of some models, which this attention does not support."""


def register_document_attention() -> None:
    """Register both implementations with transformers, with a mask function of their own."""
    for name, attend in ((DOCUMENT_ATTENTION, attend_documents), (VARLEN_ATTENTION, attend_by_varlen)):
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, defer_mask)


def use_document_attention(model: CausalModel, name: str = DOCUMENT_ATTENTION) -> None:
    """Have a model attend by documents, with one of the two implementations."""
    register_document_attention()
    model.set_attn_implementation(name)


@dataclass(eq=False)
class DeferredMask:
    """The arguments of a mask, which is built only if document boundaries are not given."""

    arguments: dict[str, Any]
    """Arguments of transformers' sdpa_mask."""

    @cached_property
    def dense(self) -> Any:
        """The mask for sdpa: bool [rows, 1, length, length], or None for a plain causal mask."""
        return sdpa_mask(**self.arguments)

    @property
    def is_padded(self) -> bool:
        """Whether the model was called with an attention mask."""
        return self.arguments.get("attention_mask") is not None

    @cached_property
    def is_plain(self) -> bool:
        """Whether every token may attend to all previous tokens, apart from a sliding window.

        With a KV cache or an attention mask, transformers does not infer documents from position ids.
        """
        has_borders = not self.arguments.get("allow_is_causal_skip", True)
        return not has_borders and (not self.is_padded or bool(self.arguments["attention_mask"].all()))

    def of_document(self, start: int, length: int) -> Any:
        """Return a document's block of the mask: bool [1, 1, length, length], or None if it is plain causal."""
        place = {"q_length": length, "kv_length": length, "q_offset": start, "kv_offset": start}
        return sdpa_mask(**(self.arguments | place | {"allow_is_causal_skip": True}))


def defer_mask(**arguments: Any) -> Any:
    """Return the mask that transformers requests: deferred if rows may hold several documents, otherwise sdpa's."""
    if arguments["q_length"] == arguments["kv_length"] and not arguments.get("use_vmap"):
        return DeferredMask(arguments)
    return sdpa_mask(**arguments)


def attend_documents(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention per document if `cu_seq_lens_q` has their boundaries, otherwise sdpa's attention.

    Args:
        module: the attention layer.
        query: [1, heads, length, size] with boundaries.
        key: [1, key heads, length, size].
        value: [1, key heads, length, value size].
        attention_mask: result of `defer_mask`.
        settings: scaling, dropout, and keyword arguments of the model call.

    Returns:
        The attention output, [1, length, heads, value size], and None.

    Raises:
        ValueError: boundaries do not match the row, or several documents have neither boundaries nor a mask.
    """
    if settings.get("cu_seq_lens_q") is None:
        _refuse_lost_borders(query, attention_mask, settings.get("position_ids"))
        mask = attention_mask.dense if isinstance(attention_mask, DeferredMask) else attention_mask
        output: torch.Tensor = sdpa_attention_forward(module, query, key, value, mask, **settings)[0]
        return output, None
    _check_row(query, key, attention_mask, settings)
    lengths = _document_lengths(query, settings)
    if query.is_cuda:  # only flash attention's kernel shares keys; for others torch would fall back to plain products
        key, value = (repeat_kv(tensor, query.shape[1] // tensor.shape[1]) for tensor in (key, value))
    outputs, start = [], 0
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    for own_query, own_key, own_value in zip(queries, keys, values, strict=True):
        mask = attention_mask.of_document(start, own_query.shape[2])
        if mask is None and _is_faster_by_products(own_query, settings):
            outputs.append(_attend_by_products(own_query, own_key, own_value, settings.get("scaling")))
        else:
            outputs.append(_attend_by_sdpa(own_query, own_key, own_value, mask, settings))
        start += own_query.shape[2]
    return torch.cat(outputs, dim=1), None


def attend_by_varlen(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Compute `attend_documents` with one kernel for all documents, with `max_length_q` beside their boundaries."""
    borders, longest, window = (settings.get(name) for name in ("cu_seq_lens_q", "max_length_q", "sliding_window"))
    # Documents by themselves are for the rest, such as local attention that is not a window but of chunks.
    is_known = isinstance(attention_mask, DeferredMask) and attention_mask.arguments.get("local_size") == window
    is_served = query.shape[-1] == value.shape[-1] and not settings.get("dropout")
    if borders is None or longest is None or not is_known or not is_served:
        return attend_documents(module, query, key, value, attention_mask, **settings)
    _check_row(query, key, attention_mask, settings)
    _document_lengths(query, settings)
    # Not by an index, whose gradient would be a copy.
    rows = [tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value)]
    if torch.is_autocast_enabled(query.device.type):  # which trained norms of queries and keys leave in float32
        rows = [tensor.to(torch.get_autocast_dtype(query.device.type)) for tensor in rows]
    return varlen(rows, borders, longest, window, settings.get("scaling")).unsqueeze(0), None


def varlen(
    rows: Sequence[torch.Tensor], borders: torch.Tensor, longest: int, window: int | None, scaling: float | None
) -> torch.Tensor:
    """Compute causal attention by torch's kernel for documents of several lengths.

    Args:
        rows: queries, keys and values, [tokens, heads, size].
        borders: cumulative lengths of the documents, int32, [documents + 1].
        longest: length of the longest.
        window: number of keys that a query attends to; None for all up to its own.
        scaling: factor of the scores; None for 1/√size.

    Raises:
        RuntimeError: torch or the GPU has no such kernel.
    """
    if varlen_attn is None:
        raise RuntimeError(f"torch {torch.__version__} has none")
    query, key, value = rows
    output: torch.Tensor = varlen_attn(
        query, key, value, borders, borders, longest, longest, scale=scaling,
        window_size=(-1 if window is None else window - 1, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return output


def _document_lengths(query: torch.Tensor, settings: dict[str, Any]) -> list[int]:
    """Return the lengths of a row's documents, which a batch on a GPU brings along as `document_lengths`.

    Raises:
        ValueError: they do not fill the row.
    """
    borders = settings["cu_seq_lens_q"]
    lengths: list[int] | None = settings.get("document_lengths") if borders.is_cuda else None
    if lengths is None:
        if not hasattr(borders, "document_lengths"):  # kept, so that a GPU is waited for once per step
            borders.document_lengths = borders.diff().tolist()
        lengths = list(borders.document_lengths)
    if sum(lengths) != query.shape[2]:
        raise ValueError(f"documents of {sum(lengths)} tokens in a row of {query.shape[2]}")
    return lengths


def _check_row(query: torch.Tensor, key: torch.Tensor, attention_mask: Any, settings: dict[str, Any]) -> None:
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError("borders of documents are for one row without a cache of earlier keys")
    if not isinstance(attention_mask, DeferredMask) or attention_mask.is_padded:
        raise ValueError("borders of documents and an attention mask were given, only one of them can hold")
    unknown = [name for name in OTHER_TERMS if settings.get(name) is not None]
    if unknown:
        raise ValueError(f"attention to single documents knows no {', '.join(unknown)}")


def _refuse_lost_borders(query: torch.Tensor, attention_mask: Any, positions: Any) -> None:
    """Raise if documents would attend to each other: positions restart, and no mask separates them."""
    if query.shape[2] == 1 or positions is None or positions.ndim != 2:
        return
    is_plain = attention_mask.is_plain if isinstance(attention_mask, DeferredMask) else attention_mask is None
    if not is_plain:
        return
    if not hasattr(positions, "is_consecutive"):
        positions.is_consecutive = bool((positions.diff() == 1).all())
    if not positions.is_consecutive:
        raise ValueError("a row of several documents needs cu_seq_lens_q, or use_cache=False and no attention_mask")


def _is_faster_by_products(query: torch.Tensor, settings: dict[str, Any]) -> bool:
    """Return whether matrix products are faster than torch's kernel, which is 1.7× slower at 512 tokens, 3× at 64."""
    is_slow_type = query.device.type == "cpu" and query.dtype == torch.bfloat16
    return is_slow_type and query.shape[2] <= LONGEST_BY_PRODUCTS and not settings.get("dropout")


def _attend_by_sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, settings: dict[str, Any]
) -> torch.Tensor:
    """Compute one document's attention by torch's kernels, to [1, length, heads, value size]."""
    output = functional.scaled_dot_product_attention(
        query, key, value, mask, dropout_p=settings.get("dropout", 0.0), is_causal=mask is None,
        scale=settings.get("scaling"), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return output.transpose(1, 2)


def _attend_by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Compute causal attention by matrix products: [1, heads, length, size] to [1, length, heads, value size].

    Queries are processed in blocks, each with the keys up to its end, which skips half of the products. Queries that
    share a key head form one matrix, so that keys are not repeated.
    """
    own_length = query.shape[2]
    missing = round_up(own_length, LENGTH_UNIT) - own_length  # as last keys, which no earlier query sees
    query, key, value = (functional.pad(tensor, (0, 0, 0, missing)) for tensor in (query, key, value))
    _, heads, length, size = query.shape
    keys, values = key[0].transpose(1, 2), value[0]
    groups = heads // len(values)
    alpha = size**-0.5 if scaling is None else scaling
    outputs, end = [], 0
    for block in query.view(len(values), groups, length, size).split(QUERY_BLOCK, dim=2):
        end += block.shape[2]
        bias = _causal_bias(block, end).repeat(1, groups, 1)
        scores = torch.baddbmm(bias, block.reshape(len(values), -1, size), keys[..., :end], alpha=alpha)
        mixed = torch.bmm(functional.softmax(scores, dim=-1), values[:, :end])
        outputs.append(mixed.view(1, heads, -1, values.shape[-1]).transpose(1, 2))
    return torch.cat(outputs, dim=1)[:, :own_length]


def _causal_bias(block: torch.Tensor, end: int) -> torch.Tensor:
    """Return a bias of -inf for keys after their query, [1, queries, end]; the last query is at position end - 1."""
    queries = block.shape[2]
    bias = torch.full((1, queries, end), -torch.inf, dtype=block.dtype, device=block.device)
    return bias.triu(end - queries + 1)
