"""A KV cache in pages of one pool that is made once, for GPUs.

A sequence gets as many pages as its longest answer needs (Kwon et al. 2023, PagedAttention). So nothing is copied when
others start or end, what has been promised is never exceeded, and sequences with the same beginning share its pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from loratune.engine.forward_batch import ForwardBatch
from loratune.engine.kv_cache import KVCache

Kernel: TypeAlias = Callable[..., torch.Tensor]
PAGE = 256
"""Tokens of a page; flash attention 2 takes multiples of this only."""
_SCRATCH = 0
"""The page that takes what is computed for padding."""


class PagedBatch(ForwardBatch):
    """The input of a pass over pages.

    Args:
        batch: slots, starts, counts and device; see `ForwardBatch`.
        tables: pages of each slot, in order.
        numbers: the same on the device, int32 [slots, most pages].
        kernel: `torch.nn.attention.varlen.varlen_attn` where it reads pages; None to gather them for sdpa.
    """

    unit = PAGE

    def __init__(
        self,
        *batch: Any,
        tables: Sequence[list[int]],
        numbers: torch.Tensor,
        kernel: Kernel | None,
    ) -> None:
        super().__init__(*batch)
        slots, device = self.slots, self.device
        self._kernel, pages = kernel, self.end // PAGE
        self.table = numbers[self.places[0], :pages]
        """Pages of each row, int32 [rows, pages]."""
        own = tables[slots[0]][:pages]
        self._run = own[0] if len(slots) == 1 and own == list(range(own[0], own[0] + pages)) else None
        """The first page of a single row whose pages follow each other."""
        page = self.table.gather(1, self.positions // PAGE)
        self.targets = (page * PAGE + self.positions % PAGE).masked_fill(self.is_padding, _SCRATCH * PAGE).flatten()
        """Where in the pool each new token goes, int64 [rows · width]."""
        if kernel is not None:
            self._used = self.ends.int()
            self._borders = torch.arange(0, len(slots) * self.width + 1, self.width, dtype=torch.int32, device=device)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, scale: float | None
    ) -> torch.Tensor:
        """Compute the attention of each row to its own pages; key and value are [pages, PAGE, key heads, size]."""
        if self._kernel is None:
            return super().attend(query, self._gathered(key), self._gathered(value), window, scale)
        rows, heads, width, size = query.shape
        # Padding is left of a row's tokens, so that the last query is at the last key. One query sees all keys, and is
        # computed faster where the kernel need not look for those that come after it.
        output = self._kernel(
            query.transpose(1, 2).reshape(-1, heads, size),
            key,
            value,
            self._borders,
            None,
            width,
            self.longest,
            scale=scale,
            window_size=(-1 if window is None else window - 1, -1 if width == 1 else 0),
            enable_gqa=heads != key.shape[2],
            seqused_k=self._used,
            block_table=self.table,
        )
        return output.view(rows, width, heads, size)

    def _gathered(self, pool: torch.Tensor) -> torch.Tensor:
        """Return the rows' pages as [rows, heads, end, size]: a view of a single run, else a copy."""
        rows, pages = self.table.shape
        own = pool[self.table.flatten()] if self._run is None else pool[self._run : self._run + pages]
        return own.view(rows, pages * PAGE, *pool.shape[2:]).transpose(1, 2)


class PagedKVCache(KVCache):
    """Keys and values as [pages, PAGE, heads, size] per layer.

    Args:
        layers: see `KVCache`.
        tokens: room of the pool, without the page for padding.
        kernel: see `PagedBatch`.
    """

    is_fixed = True

    def __init__(self, layers: int, tokens: int, kernel: Kernel | None = None) -> None:
        super().__init__(layers, tokens // PAGE * PAGE)
        self._kernel = kernel
        self._numbers: torch.Tensor | None = None
        """`_tables` on the device; None if they have changed."""
        self._start_over(tokens // PAGE)

    def another(self, tokens: int) -> KVCache:
        return PagedKVCache(len(self._kept), _pages(tokens) * PAGE, self._kernel)

    def fits(self, lengths: Sequence[int]) -> bool:
        return sum(map(_pages, lengths)) < len(self._users)

    def begin(self, lengths: Sequence[int], source: int = 0, shared: int = 0) -> int:
        if not self.fits(lengths):  # which one alone may be
            super().clear()
            self._start_over(_pages(lengths[-1]))
            shared = 0
        slot, wanted = len(lengths) - 1, _pages(lengths[-1])
        self._tables += [[] for _ in range(slot + 1 - len(self._tables))]
        table = self._tables[source][: _pages(shared)] if shared else []
        for page in table:
            self._users[page] += 1
        self._release(slot)
        # The page in which the beginnings part is written to, so that it has to be this sequence's alone.
        for other in (None, *self._idle(len(lengths), source)):
            if other is not None:
                self._release(other)
            is_split = bool(shared % PAGE) and self._users[table[-1]] > 1
            if len(self._free) >= wanted - len(table) + is_split:
                break
        if is_split:
            page = table.pop()
            table += self._take(1)
            self._copy(page, table[-1])
            self._users[page] -= 1
        table += self._take(wanted - len(table))
        self._tables[slot], self._numbers = table, None
        return shared

    def end(self, slot: int, last: int, length: int) -> bool:
        self._tables[slot], self._tables[last] = self._tables[last], self._tables[slot]
        self._ended += 1
        self._left[last], self._numbers = self._ended, None
        return True

    def holds(self, slot: int, length: int) -> bool:
        return slot < len(self._tables) and length <= len(self._tables[slot]) * PAGE

    def batch(self, slots: list[int], starts: list[int], counts: list[int], device: Any) -> ForwardBatch:
        if self._numbers is None:
            most = max(map(len, self._tables))
            filled = [[*table, *[_SCRATCH] * (most - len(table))] for table in self._tables]
            self._numbers = torch.tensor(filled, dtype=torch.int32).to(device, non_blocking=True)
        pages = {"tables": self._tables, "numbers": self._numbers, "kernel": self._kernel}
        return PagedBatch(slots, starts, counts, device, **pages)

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any) -> Any:
        feed = self.feed
        if not isinstance(feed, PagedBatch):
            raise RuntimeError("a pass over pages without its batch")
        if not self._kept[layer]:
            self._kept[layer] = (_pool(keys, len(self._users)), _pool(values, len(self._users)))
        for pool, new in zip(self._kept[layer], (keys, values), strict=True):
            heads, size = pool.shape[2:]
            pool.view(-1, heads, size).index_copy_(0, feed.targets, new.transpose(1, 2).reshape(-1, heads, size))
        return self._kept[layer]

    def clear(self) -> None:
        is_incomplete = any(self._kept) and not all(self._kept)
        super().clear()
        pages = len(self._users) - 1
        # What was free for the pool is not any more: a smaller one may still find room.
        self._start_over(max(1, pages // 2) if is_incomplete else pages)

    def _start_over(self, pages: int) -> None:
        self._tables: list[list[int]] = []
        """Pages of each slot, in order."""
        self._users = [1] + [0] * pages
        """Number of tables that each page is in."""
        self._free = list(range(1, pages + 1))
        """Pages in no table, in order."""
        self._left: dict[int, int] = {}
        """Slot → number of sequences that had ended when its own did."""
        self._ended = 0
        self._numbers = None

    def _idle(self, running: int, source: int) -> list[int]:
        """Return the slots of ended sequences in the order in which they make way, one that is needed last."""
        found = [slot for slot in range(running, len(self._tables)) if self._tables[slot]]
        return sorted(found, key=lambda slot: (slot == source, self._left.get(slot, 0)))

    def _take(self, count: int) -> list[int]:
        """Take free pages, which follow each other if possible: those of a single row are then read in place."""
        free = self._free
        starts = range(len(free) - count + 1)
        first = next((start for start in starts if count and free[start + count - 1] - free[start] == count - 1), 0)
        taken, self._free = free[first : first + count], free[:first] + free[first + count :]
        for page in taken:
            self._users[page] += 1
        return taken

    def _release(self, slot: int) -> None:
        for page in self._tables[slot]:
            self._users[page] -= 1
        self._free = sorted([*self._free, *(page for page in self._tables[slot] if not self._users[page])])
        self._tables[slot] = []

    def _copy(self, source: int, target: int) -> None:
        for kept in self._kept:
            for pool in kept:
                pool[target] = pool[source]


def _pages(tokens: int) -> int:
    """Return the number of pages that a number of tokens takes."""
    return -(-tokens // PAGE)


def _pool(like: torch.Tensor, pages: int) -> torch.Tensor:
    """Empty pages for keys or values [rows, heads, width, size]; not even masked numbers may be infinite."""
    return like.new_zeros(pages, PAGE, like.shape[1], like.shape[3])
