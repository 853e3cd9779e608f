"""The input of one forward pass over a KV cache, and the attention function that reads the cache.

Sequences of different lengths are decoded together: a mask hides positions that are not a row's own. transformers'
caches and masks require rows of equal length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface

from loratune.errors import Exit, LoratuneError
from loratune.model.kernels.packed_attention import OTHER_TERMS
from loratune.multiples import round_up
from loratune.protocols import CausalModel

SLOT_ATTENTION = "slots"
"""Name of the attention function as a model's attn_implementation."""
LENGTH_UNIT = 64
"""Keys are read up to a multiple of this, because libraries below torch compile and cache a kernel per shape."""


class DecodingError(LoratuneError):
    """Several sequences of a model cannot share a forward pass."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, Exit.MODEL)
        self.reason = reason


def use_slot_attention(model: CausalModel) -> None:
    """Have a model attend to the KV cache that its `ForwardBatch` belongs to."""
    AttentionInterface.register(SLOT_ATTENTION, attend_slots)
    AttentionMaskInterface.register(SLOT_ATTENTION, no_mask)
    model.set_attn_implementation(SLOT_ATTENTION)


class ForwardBatch:
    """The input of one forward pass: each row has `counts[i]` new tokens at its right end.

    The rest of a row is left padding, which is not written to the cache and is masked. What the layers need is made
    once, since each copy to a GPU and each launch costs time.

    Args:
        slots: slot of each row.
        starts: number of tokens that each row's slot already holds.
        counts: number of new tokens of each row.
        device: of the model.
        is_unpadded: whether rows have no padding. Their counts are equal then.
    """

    unit = LENGTH_UNIT

    def __init__(
        self, slots: list[int], starts: list[int], counts: list[int], device: Any, is_unpadded: bool = False
    ) -> None:
        self.slots, self.starts, self.counts, self.device = slots, starts, counts, device
        widest = max(counts)
        if is_unpadded and widest != min(counts):
            raise ValueError(f"rows of {min(counts)} to {widest} tokens without padding")
        self.width = widest if widest == 1 or is_unpadded else round_up(widest, LENGTH_UNIT // 2)
        """Padded length of a row."""
        ends = [start + count for start, count in zip(starts, counts, strict=True)]
        self.longest = max(ends)
        """Most tokens that a row's slot holds after the pass."""
        self.end = round_up(self.longest, self.unit)
        """Length up to which keys are read."""
        last = slots[0] + len(slots)
        self.run = slice(slots[0], last) if slots == list(range(slots[0], last)) else None
        """The rows' slots where they follow each other."""
        # A GPU need not have finished what came before.
        numbers = torch.tensor([slots, starts, ends, counts]).to(device, non_blocking=True)
        self.places = numbers[:2]
        """`slots` and `starts` on the device, int64 [2, rows]."""
        self.ends = numbers[2]
        """Tokens that each row's slot holds after the pass, int64 [rows]."""
        first, fill = self.ends.unsqueeze(1) - self.width, self.width - numbers[3].unsqueeze(1)
        steps = torch.arange(self.width, device=device)
        self.is_padding = steps < fill
        """bool [rows, width]."""
        self.positions = torch.where(self.is_padding, 0, first + steps)
        """int64 [rows, width]; 0 for padding."""
        self.windows: set[int | None] = set()
        """Sliding windows of the layers that have attended, in tokens; None for no limit."""
        self.left_out: set[str] = set()
        """Terms of the attention scores that the model has and `attend` does not."""
        self._masks: dict[tuple[int | None, torch.dtype], torch.Tensor] = {}

    def require_all_terms(self) -> None:
        """Raise if terms were left out; after the pass, since other processes that gather weights with it go on in it.

        Raises:
            DecodingError: the model adds other terms to the attention scores.
        """
        if self.left_out:
            listed = ", ".join(sorted(self.left_out))
            raise DecodingError(f"its attention has a term that loratune's does not have ({listed})")

    def mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Return the attention mask: [rows, 1, width, end], 0 where a query may attend, -inf elsewhere.

        Args:
            window: sliding window in tokens, including the token itself; None for no limit.
            dtype: of the queries.
        """
        if (window, dtype) not in self._masks:
            keys = torch.arange(self.end, device=self.device)
            behind = self.positions.unsqueeze(-1) - keys  # distance from a key to its query
            hidden = behind < 0
            if window is not None:
                hidden |= behind >= window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill_(hidden, -torch.inf)
            self._masks[window, dtype] = mask.unsqueeze(1)
        return self._masks[window, dtype]

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, scale: float | None
    ) -> torch.Tensor:
        """Compute the attention of each row to its own slot.

        Args:
            query: [rows, heads, width, size], or of the last positions only, where a layer computes no others.
            key: as the cache's `update` returns it; here [rows, key heads, end, size].
            value: like `key`; its size may be another one.
            window: see `mask`.
            scale: factor of the scores; None for size**-0.5.

        Returns:
            [rows, positions of the query, heads, size of the values].
        """
        rows, heads, width, size = query.shape
        groups = heads // key.shape[1]
        if width == 1:
            # Grouped queries become additional queries of their key head, which avoids repeating keys.
            query = query.reshape(rows, heads // groups, groups, size)
        elif groups > 1:
            key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        mask = self.mask(window, query.dtype)
        if width != self.width:
            mask = mask[:, :, -width:]
        output = functional.scaled_dot_product_attention(query, key, value, mask, scale=scale)
        return output.reshape(rows, heads, width, value.shape[-1]).transpose(1, 2)


def no_mask(**_: Any) -> None:
    """Return no mask: a `ForwardBatch` has its own, because transformers' masks need rows of equal length."""


def attend_slots(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **settings: Any
) -> tuple[torch.Tensor, None]:
    """Compute the attention of each row to its own slot.

    Args:
        module: the attention layer.
        query: [rows, heads, width, size].
        key: as the cache's `update` returns it.
        value: like `key`.
        attention_mask: not used.
        settings: `feed`, scaling, sliding_window, and other arguments of the model.

    Returns:
        The attention output, [rows, width, heads, size], and None. Other terms of the model's own are left out of the
        scores, and `ForwardBatch.require_all_terms` raises after the pass.
    """
    feed: ForwardBatch = settings["feed"]
    feed.left_out.update(name for name in OTHER_TERMS if settings.get(name) is not None)
    window = settings.get("sliding_window")
    feed.windows.add(window)
    return feed.attend(query, key, value, window, settings.get("scaling")), None
