"""The KV cache: one slot per sequence, as the scheduler sees it, and in storage that grows.

On a CPU the memory of a tensor is taken only as it is written, and reading slots that follow each other takes no copy.
`paged_cache` is for GPUs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from loratune.engine.forward_batch import LENGTH_UNIT, ForwardBatch
from loratune.engine.slot_states import StateCache, rounded_slots
from loratune.multiples import round_up


class KVCache(StateCache):
    """Keys and values of the running sequences, in slots that are numbered from 0 without gaps.

    Slots after these may hold what ended sequences have left, for prompts with the same beginning. A layer without keys
    has states in their place, see `slot_states`.

    Args:
        layers: number of the model's layers.
        tokens: room that is promised to running sequences; None for no limit.
        has_states: whether some layers have states.
    """

    is_fixed = False
    """Whether the memory is taken at once and kept."""

    def __init__(self, layers: int, tokens: int | None, has_states: bool = False) -> None:
        super().__init__()
        self.tokens, self.has_states = tokens, has_states
        self._kept: list[tuple[torch.Tensor, ...]] = [()] * layers
        """Storage of each layer's keys and values."""

    @abstractmethod
    def another(self, tokens: int) -> KVCache:
        """Return an empty cache of the same kind, with room for a number of tokens."""

    @abstractmethod
    def fits(self, lengths: Sequence[int]) -> bool:
        """Return whether sequences of these lengths can be promised room."""

    def begin(self, lengths: Sequence[int], source: int = 0, shared: int = 0) -> int:
        """Make room for one more sequence.

        Args:
            lengths: most tokens of each running sequence, the new one's last. They fit, or there is one only.
            source: a slot with the same beginning, of a running sequence or of one that has ended.
            shared: number of tokens that are the same; all that the slot holds if there are states.

        Returns:
            Number of tokens that the new sequence's slot now holds; 0 if the source had to make way.
        """
        held = self._begin(lengths, source, shared)
        self.states.begin(len(lengths) - 1, source if held else None)
        return held

    def end(self, slot: int, last: int, length: int) -> bool:
        """Move the last running sequence to a slot whose sequence has ended.

        Args:
            slot: slot of the sequence that has ended.
            last: slot of the last one; it may be the same.
            length: tokens of the last one.

        Returns:
            Whether the last slot now holds what has ended, otherwise a copy of what was moved.
        """
        has_swapped = self._end(slot, last, length)
        self.states.move(last, slot, has_swapped)
        return has_swapped

    @abstractmethod
    def holds(self, slot: int, length: int) -> bool:
        """Return whether a slot still has this many tokens."""

    @abstractmethod
    def batch(self, slots: list[int], starts: list[int], counts: list[int], device: Any) -> ForwardBatch:
        """Return the input of a pass. See `ForwardBatch`."""

    @abstractmethod
    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any) -> Any:
        """Write the keys and values of a forward pass for one layer.

        Args:
            keys: [rows, heads, width, size].
            values: like `keys`; heads and size may be others.
            layer: index of the layer.

        Returns:
            Keys and values for the `attend` of the pass's batch.
        """

    def clear(self) -> None:
        """Free the memory."""
        self._kept = [()] * len(self._kept)
        self.states.clear()

    @property
    def size_bytes(self) -> int:
        held = [*self.states.tensors(), *(storage for kept in self._kept for storage in kept)]
        return sum(storage.nbytes for storage in held)

    @abstractmethod
    def _begin(self, lengths: Sequence[int], source: int, shared: int) -> int:
        """Do what `begin` does for keys and values."""

    @abstractmethod
    def _end(self, slot: int, last: int, length: int) -> bool:
        """Do what `end` does for keys and values."""


def reserved_tokens(slots: int, length: int) -> int:
    """How many tokens a cache has room for that was asked for so many slots of such a length."""
    return rounded_slots(slots) * round_up(length, LENGTH_UNIT)


class BatchedKVCache(KVCache):
    """Keys and values as [slots, heads, length, size] per layer.

    Args:
        layers: see `KVCache`.
        tokens: see `KVCache`.
        has_states: see `KVCache`.
        state_tokens: number of tokens whose keys and values take as much memory as the states of one slot.
    """

    def __init__(self, layers: int, tokens: int | None = None, has_states: bool = False, state_tokens: int = 0) -> None:
        super().__init__(layers, tokens, has_states)
        self._state_tokens = state_tokens
        self._slots = self._length = self._written = 0

    def another(self, tokens: int) -> KVCache:
        return BatchedKVCache(len(self._kept), has_states=self.has_states)

    def fits(self, lengths: Sequence[int]) -> bool:
        if self.tokens is None:
            return True
        states = self._state_tokens * rounded_slots(len(lengths))
        return reserved_tokens(len(lengths), max(lengths)) + states <= self.tokens

    @property
    def token_bytes(self) -> int:
        """What the keys and values of one token take; 0 before the first pass."""
        return sum(storage[0, :, 0].nbytes for kept in self._kept for storage in kept)

    def _begin(self, lengths: Sequence[int], source: int, shared: int) -> int:
        self.reserve(len(lengths), max(lengths))
        if not self.holds(source, shared):
            return 0
        if shared:
            self._copy(source, len(lengths) - 1, shared)
        return shared

    def _end(self, slot: int, last: int, length: int) -> bool:
        self._copy(last, slot, length)
        return slot == last

    def reserve(self, slots: int, length: int) -> None:
        """Grow the cache to a number of slots and a length; its contents stay.

        Args:
            slots: number of slots in use, counted from 0.
            length: maximum tokens per slot; at least as many as any slot holds.
        """
        if slots <= self._slots and length <= self._length:
            return
        wanted = rounded_slots(slots), round_up(length, LENGTH_UNIT)
        # One tensor at a time, each old one let go before the next is made, as a GPU's memory is taken at once. Where
        # it runs out, the layers that have grown serve as the smaller ones did.
        for layer in range(len(self._kept)):
            for place in range(len(self._kept[layer])):
                moved = self._moved(self._kept[layer][place], *wanted)
                self._kept[layer] = (*self._kept[layer][:place], moved, *self._kept[layer][place + 1 :])
        self._slots, self._length = wanted
        self._written = min(self._written, self._length)

    def holds(self, slot: int, length: int) -> bool:
        return slot < self._slots and length <= self._length

    def batch(self, slots: list[int], starts: list[int], counts: list[int], device: Any) -> ForwardBatch:
        return ForwardBatch(slots, starts, counts, device, self.has_states)

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any) -> Any:
        feed = self._fed
        self._written = max(self._written, feed.end)
        if not self._kept[layer]:
            room = self._slots, self._length
            self._kept[layer] = (_storage(keys, *room), _storage(values, *room))
        read = []
        for storage, new in zip(self._kept[layer], (keys, values), strict=True):
            _write(storage, new, feed)
            read.append(_rows(storage[:, :, : feed.end], feed))
        return tuple(read)

    def clear(self) -> None:
        super().clear()
        self._slots = self._length = self._written = 0

    def _copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another."""
        if source != target and length:
            for kept in self._kept:
                for storage in kept:
                    storage[target, :, :length] = storage[source, :, :length]

    def _moved(self, old: torch.Tensor, slots: int, length: int) -> torch.Tensor:
        """Storage of another size, with what has been written."""
        new = _storage(old, slots, length)
        slots, written = min(slots, len(old)), min(self._written, length)
        new[:slots, :, :written] = old[:slots, :, :written]
        return new


def _storage(like: torch.Tensor, slots: int, length: int) -> torch.Tensor:
    """Empty storage of one layer; on a CPU it takes no memory until it is written."""
    return like.new_zeros(slots, like.shape[1], length, like.shape[3])


def _rows(storage: torch.Tensor, feed: ForwardBatch) -> torch.Tensor:
    """A view where the slots follow each other, else a copy."""
    return storage[feed.places[0] if feed.run is None else feed.run]


def _write(storage: torch.Tensor, new: torch.Tensor, feed: ForwardBatch) -> None:
    if feed.width == 1:
        slots, starts = feed.places
        storage[slots, :, starts] = new[:, :, 0]
        return
    for row, (slot, start, count) in enumerate(zip(feed.slots, feed.starts, feed.counts, strict=True)):
        storage[slot, :, start : start + count] = new[row, :, feed.width - count :]
