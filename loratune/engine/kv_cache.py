"""A KV cache with one slot per sequence, and the attention function that reads it.

Sequences of different lengths are decoded together: a step reads all slots up to the end of the longest sequence, and a
mask hides other positions. transformers' caches require rows of equal length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache

from loratune.errors import Exit, LoratuneError
from loratune.model.architecture.structure import (
    LayerState,
    head_size,
    key_value_heads,
    layer_count,
    layer_kinds,
    layer_states,
)
from loratune.model.kernels.packed_attention import OTHER_TERMS
from loratune.multiples import round_up
from loratune.protocols import CausalModel

SLOT_ATTENTION = "slots"
"""Name of the attention function as a model's attn_implementation."""
LENGTH_UNIT = 64
"""Keys are read up to a multiple of this, because libraries below torch compile and cache a kernel per shape."""
SLOTS_UNIT = 4
"""Slots after the first are made so many at a time, so that not every new answer copies those that run."""


class DecodingError(LoratuneError):
    """The model has layers whose state is not keys and values per token."""

    def __init__(self, kind: str) -> None:
        super().__init__(f"{kind} is not supported for inference in loratune; use transformers' generate", Exit.MODEL)


def use_slot_attention(model: CausalModel) -> None:
    """Have a model attend to the slots of a `BatchedKVCache`.

    Raises:
        DecodingError: it has layers with another kind of state, such as linear attention.
    """
    layers = zip(layer_kinds(model.config), layer_states(model.config), strict=True)
    strange = sorted({kind for kind, state in layers if state is LayerState.OTHER})
    if strange:
        raise DecodingError(f"a model with layers of {', '.join(strange)}")
    AttentionInterface.register(SLOT_ATTENTION, attend_slots)
    AttentionMaskInterface.register(SLOT_ATTENTION, no_mask)
    model.set_attn_implementation(SLOT_ATTENTION)


def token_bytes(model: CausalModel) -> int:
    """What the keys and values of one token take."""
    config = model.config
    return 2 * layer_count(config) * key_value_heads(config) * head_size(config) * int(model.dtype.itemsize)


@dataclass
class ForwardBatch:
    """The input of one forward pass: each row has `counts[i]` new tokens at its right end.

    The rest of a row is left padding, which is not written to the cache and is masked.
    """

    slots: list[int]
    """Slot of each row."""
    starts: list[int]
    """Number of tokens that each row's slot already holds."""
    counts: list[int]
    """Number of new tokens of each row."""
    device: Any
    width: int = field(init=False)
    """Padded length of a row."""
    end: int = field(init=False)
    """Length up to which keys are read."""
    positions: torch.Tensor = field(init=False)
    """int64 [rows, width]; 0 where a row is filled up."""
    places: torch.Tensor = field(init=False)
    """`slots` and `starts` on the device, int64 [2, rows]; one copy for all layers, since a GPU waits for each."""
    _masks: dict[int | None, torch.Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        widest = max(self.counts)
        self.width = 1 if widest == 1 else round_up(widest, LENGTH_UNIT // 2)
        ends = [start + count for start, count in zip(self.starts, self.counts, strict=True)]
        self.end = round_up(max(ends), LENGTH_UNIT)
        numbers = torch.tensor([self.slots, self.starts, ends, self.counts]).to(self.device, non_blocking=True)
        self.places = numbers[:2]
        first, fill = numbers[2].unsqueeze(1) - self.width, self.width - numbers[3].unsqueeze(1)
        steps = torch.arange(self.width, device=self.device)
        self.positions = torch.where(steps < fill, 0, first + steps)

    def mask(self, window: int | None) -> torch.Tensor:
        """Return the attention mask: bool [rows, 1, width, end], True where a query may attend.

        Args:
            window: sliding window in tokens, including the token itself; None for no limit.
        """
        if window not in self._masks:
            keys = torch.arange(self.end, device=self.device)
            behind = self.positions.unsqueeze(-1) - keys  # distance from a key to its query
            sees = behind >= 0
            if window is not None:
                sees &= behind < window
            self._masks[window] = sees.unsqueeze(1)
        return self._masks[window]


def reserved_tokens(slots: int, length: int) -> int:
    """How many tokens a cache has room for that was asked for so many slots of such a length."""
    return _rounded_slots(slots) * round_up(length, LENGTH_UNIT)


class BatchedKVCache(Cache):
    """Keys and values as [slots, heads, length, size] per layer.

    Args:
        layers: number of the model's layers.
    """

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[])
        self._kept: list[tuple[torch.Tensor, ...]] = [()] * layers
        self._slots = self._length = self._written = 0
        self.feed: ForwardBatch | None = None
        """The input of the current forward pass."""

    def reserve(self, slots: int, length: int) -> None:
        """Grow the cache to a number of slots and a length; its contents stay.

        Args:
            slots: number of slots in use, counted from 0.
            length: maximum tokens per slot; at least as many as any slot holds.
        """
        if slots <= self._slots and length <= self._length:
            return
        wanted = _rounded_slots(slots), round_up(length, LENGTH_UNIT)
        # One tensor at a time, each old one let go before the next is made, as a GPU's memory is taken at once. Where
        # it runs out, the layers that have grown serve as the smaller ones did.
        for layer in range(len(self._kept)):
            for place in range(len(self._kept[layer])):
                moved = self._moved(self._kept[layer][place], *wanted)
                self._kept[layer] = (*self._kept[layer][:place], moved, *self._kept[layer][place + 1 :])
        self._slots, self._length = wanted
        self._written = min(self._written, self._length)

    def holds(self, slot: int, length: int) -> bool:
        """Return whether a slot has room for this many tokens."""
        return slot < self._slots and length <= self._length

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any) -> Any:
        """Write the keys and values of a forward pass for one layer.

        Args:
            keys: [rows, heads, width, size].
            values: like `keys`.
            layer: index of the layer.

        Returns:
            Keys and values of the rows' slots, [rows, heads, end, size].
        """
        feed = self.feed
        if feed is None:
            raise RuntimeError("a pass over the slots without a feed")
        self._written = max(self._written, feed.end)
        if not self._kept[layer]:
            room = self._slots, self._length
            self._kept[layer] = (_storage(keys, *room), _storage(values, *room))
        read = []
        for storage, new in zip(self._kept[layer], (keys, values), strict=True):
            _write(storage, new, feed)
            read.append(_rows(storage[:, :, : feed.end], feed))
        return tuple(read)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another."""
        for kept in self._kept:
            for storage in kept:
                storage[target, :, :length] = storage[source, :, :length]

    def clear(self) -> None:
        """Free the memory."""
        self._kept = [()] * len(self._kept)
        self._slots = self._length = self._written = 0

    @property
    def size_bytes(self) -> int:
        return sum(storage.numel() * storage.element_size() for kept in self._kept for storage in kept)

    def _moved(self, old: torch.Tensor, slots: int, length: int) -> torch.Tensor:
        """Storage of another size, with what has been written."""
        new = _storage(old, slots, length)
        slots, written = min(slots, len(old)), min(self._written, length)
        new[:slots, :, :written] = old[:slots, :, :written]
        return new


def _storage(like: torch.Tensor, slots: int, length: int) -> torch.Tensor:
    """Empty storage of one layer; on a CPU it takes no memory until it is written."""
    return like.new_zeros(slots, like.shape[1], length, like.shape[3])


def no_mask(**_: Any) -> None:
    """Return no mask: `attend_slots` uses the feed's, because transformers' masks need rows of equal length."""


def attend_slots(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **settings: Any
) -> tuple[torch.Tensor, None]:
    """Compute the attention of each row to its own slot.

    Args:
        module: the attention layer.
        query: [rows, heads, width, size].
        key: [rows, key heads, end, size].
        value: like `key`.
        attention_mask: not used.
        settings: `feed`, scaling, sliding_window, and other arguments of the model.

    Returns:
        The attention output, [rows, width, heads, size], and None.

    Raises:
        DecodingError: the model adds other terms to the attention scores.
    """
    unknown = [name for name in OTHER_TERMS if settings.get(name) is not None]
    if unknown:
        raise DecodingError(f"a model whose attention has {', '.join(unknown)}")
    mask = settings["feed"].mask(settings.get("sliding_window"))
    rows, heads, width, size = query.shape
    groups = heads // key.shape[1]
    if width == 1:
        # Grouped queries become additional queries of their key head, which avoids repeating keys.
        query = query.reshape(rows, heads // groups, groups, size)
    elif groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    output = functional.scaled_dot_product_attention(query, key, value, mask, scale=settings.get("scaling"))
    return output.reshape(rows, heads, width, size).transpose(1, 2), None


def _rows(storage: torch.Tensor, feed: ForwardBatch) -> torch.Tensor:
    """A view where the slots follow each other, else a copy."""
    first = feed.slots[0]
    if feed.slots == list(range(first, first + len(feed.slots))):
        return storage[first : first + len(feed.slots)]
    return storage[feed.places[0]]


def _write(storage: torch.Tensor, new: torch.Tensor, feed: ForwardBatch) -> None:
    if feed.width == 1:
        slots, starts = feed.places
        storage[slots, :, starts] = new[:, :, 0]
        return
    for row, (slot, start, count) in enumerate(zip(feed.slots, feed.starts, feed.counts, strict=True)):
        storage[slot, :, start : start + count] = new[row, :, feed.width - count :]


def _rounded_slots(count: int) -> int:
    """One alone, as most chats are, or several at a time."""
    return count if count <= 1 else round_up(count, SLOTS_UNIT)
