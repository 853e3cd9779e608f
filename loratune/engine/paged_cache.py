"""A KV cache in pages of one pool that is made once, for GPUs.

A sequence gets as many pages as its longest answer needs (Kwon et al. 2023, PagedAttention). So nothing is copied when
others start or end, and what has been promised is never exceeded. Sequences with the same beginning share its pages,
unless the kernel of this GPU needs the pages of each one in a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from loratune.engine.forward_batch import ForwardBatch
from loratune.engine.kv_cache import KVCache

PAGE = 256
"""Tokens of a page; flash attention 2 takes multiples of this only."""
_SCRATCH = 0
"""The page that takes what is computed for padding."""


class Kernel(NamedTuple):
    """`torch.nn.attention.varlen.varlen_attn`, and what it can do on a GPU."""

    attend: Callable[..., torch.Tensor]
    reads_tables: bool
    """Whether a row's pages may be anywhere, otherwise they have to follow each other."""


class PagedBatch(ForwardBatch):
    """The input of a pass over pages.

    Args:
        batch: slots, starts, counts, device and is_unpadded; see `ForwardBatch`.
        tables: pages of each slot, in order.
        numbers: the same on the device, int32 [slots, most pages].
        kernel: None to gather the pages for sdpa.
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
        pages = self.end // PAGE
        self.table = numbers[self.places[0], :pages]
        """Pages of each row, int32 [rows, pages]."""
        own = [tables[slot][: -(-(start + count) // PAGE)] for slot, start, count in zip(*batch[:3], strict=True)]
        self._firsts = [row[0] for row in own if row == list(range(row[0], row[0] + len(row)))]
        """First pages of rows whose pages follow each other."""
        are_runs = len(self._firsts) == len(own)
        self._kernel = kernel if kernel is not None and (kernel.reads_tables or are_runs) else None
        page = self.table.gather(1, self.positions // PAGE)
        self.targets = (page * PAGE + self.positions % PAGE).masked_fill(self.is_padding, _SCRATCH * PAGE).flatten()
        """Where in the pool each new token goes, int64 [rows · width]."""
        if self._kernel is not None:
            self._used = self.ends.int()
            last = len(own) * self.width
            self._borders = torch.arange(0, last + 1, self.width, dtype=torch.int32, device=self.device)
            # Where a row's keys begin in the pool. The last number is not used, as lengths are given.
            self._begins = None if self._kernel.reads_tables else functional.pad(self.table[:, 0] * PAGE, (0, 1))

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, scale: float | None
    ) -> torch.Tensor:
        """Compute the attention of each row to its own pages; key and value are [pages, PAGE, key heads, size]."""
        if self._kernel is None or query.shape[2] != self.width:
            return super().attend(query, self._gathered(key), self._gathered(value), window, scale)
        rows, heads, width, size = query.shape
        key_heads, is_flat = key.shape[2], self._begins is not None
        if is_flat:
            key, value = key.view(-1, key_heads, size), value.view(-1, key_heads, size)
        # Padding is left of a row's tokens, so that the last query is at the last key. One query sees all keys, and is
        # computed faster where the kernel need not look for those that come after it.
        output = self._kernel.attend(
            query.transpose(1, 2).reshape(-1, heads, size),
            key,
            value,
            self._borders,
            self._begins,
            width,
            self.longest,
            scale=scale,
            window_size=(-1 if window is None else window - 1, -1 if width == 1 else 0),
            enable_gqa=heads != key_heads,
            seqused_k=self._used,
            block_table=None if is_flat else self.table,
        )
        return output.view(rows, width, heads, value.shape[-1])

    def _gathered(self, pool: torch.Tensor) -> torch.Tensor:
        """Return the rows' pages as [rows, heads, end, size]: a view of a single run, else a copy."""
        rows, pages = self.table.shape
        is_run = rows == 1 and len(self._firsts) == 1
        own = pool[self._firsts[0] : self._firsts[0] + pages] if is_run else pool[self.table.flatten()]
        return own.view(rows, pages * PAGE, *pool.shape[2:]).transpose(1, 2)


class PagedKVCache(KVCache):
    """Keys and values as [pages, PAGE, heads, size] per layer.

    Args:
        layers: see `KVCache`.
        tokens: room of the pool, without the page for padding.
        kernel: see `PagedBatch`.
        has_states: see `KVCache`.
    """

    is_fixed = True

    def __init__(self, layers: int, tokens: int, kernel: Kernel | None = None, has_states: bool = False) -> None:
        super().__init__(layers, tokens // PAGE * PAGE, has_states)
        self._kernel = kernel
        self._numbers: torch.Tensor | None = None
        """`_tables` on the device; None if they have changed."""
        self._start_over(tokens // PAGE)

    def another(self, tokens: int) -> KVCache:
        return PagedKVCache(len(self._kept), _pages(tokens) * PAGE, self._kernel, self.has_states)

    def fits(self, lengths: Sequence[int]) -> bool:
        return sum(map(_pages, lengths)) < len(self._users)

    def _begin(self, lengths: Sequence[int], source: int, shared: int) -> int:
        if not self.fits(lengths):  # which one alone may be
            super().clear()
            self._start_over(_pages(lengths[-1]))
            source = shared = 0
        slot = len(lengths) - 1
        self._tables += [[] for _ in range(slot + 1 - len(self._tables))]
        same = self._tables[source][: _pages(shared)]
        for page in same:
            self._users[page] += 1
        self._drop(slot)
        place = self._share if self._kernel is None or self._kernel.reads_tables else self._repeat
        self._tables[slot], held = place(same, shared, _pages(lengths[-1]), self._idle(len(lengths), source))
        self._numbers = None
        return held

    def _share(self, same: list[int], shared: int, wanted: int, idle: Sequence[int]) -> tuple[list[int], int]:
        """Return the pages of a sequence that begins with those of another one, and the tokens that they hold.

        Args:
            same: pages that are the same up to the last, whose users are counted already.
            shared: tokens in them that are the same.
            wanted: number of pages.
            idle: slots that may make way, the last one last.
        """
        for other in (None, *idle):
            if other is not None:
                self._drop(other)
            # The page in which the beginnings part is written to, so that it has to be this sequence's alone.
            is_split = bool(shared % PAGE) and self._users[same[-1]] > 1
            if len(self._free) >= wanted - len(same) + is_split:
                break
        taken = self._take(wanted - len(same) + is_split)
        if is_split:
            self._copy(same[-1:], taken[:1])
            self._leave(same[-1:])
        return [*same[: len(same) - is_split], *taken], shared

    def _repeat(self, same: list[int], shared: int, wanted: int, idle: Sequence[int]) -> tuple[list[int], int]:
        """Like `_share`, with a copy of the pages in a run of their own, unless they have to make way."""
        for other in idle:
            if self._run(wanted) is not None:
                break
            self._drop(other)
        if len(self._free) < wanted:
            self._leave(same)
            same, shared = [], 0
        taken = self._take(wanted)
        if same:
            self._copy(same, taken[: len(same)])
            self._leave(same)
        return taken, shared

    def _end(self, slot: int, last: int, length: int) -> bool:
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
        return PagedBatch(slots, starts, counts, device, self.has_states, **pages)

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

    def end_pass(self) -> None:
        super().end_pass()
        self._is_complete = True

    def clear(self) -> None:
        is_incomplete = any(self._kept) and not self._is_complete
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
        self._is_complete = False
        """Whether a pass has made the pools of all layers."""

    def _idle(self, running: int, source: int) -> list[int]:
        """Return the slots of ended sequences in the order in which they make way, one that is needed last."""
        found = [slot for slot in range(running, len(self._tables)) if self._tables[slot]]
        return sorted(found, key=lambda slot: (slot == source, self._left.get(slot, 0)))

    def _run(self, count: int) -> int | None:
        """Return where in `_free` so many pages follow each other; None if they do nowhere."""
        free, starts = self._free, range(len(self._free) - count + 1)
        return next((start for start in starts if free[start + count - 1] - free[start] == count - 1), None)

    def _take(self, count: int) -> list[int]:
        """Take free pages, a run if there is one."""
        first = (self._run(count) or 0) if count else 0
        taken = self._free[first : first + count]
        self._free = self._free[:first] + self._free[first + count :]
        for page in taken:
            self._users[page] += 1
        return taken

    def _leave(self, pages: Sequence[int]) -> None:
        """Count one user less for some pages."""
        for page in pages:
            self._users[page] -= 1
        self._free = sorted([*self._free, *(page for page in pages if not self._users[page])])

    def _drop(self, slot: int) -> None:
        """Forget what a slot holds."""
        pages, self._tables[slot] = self._tables[slot], []
        self._leave(pages)

    def _copy(self, source: list[int], target: list[int]) -> None:
        for kept in self._kept:
            for pool in kept:
                for old, new in zip(source, target, strict=True):
                    pool[new] = pool[old]


def _pages(tokens: int) -> int:
    """Return the number of pages that a number of tokens takes."""
    return -(-tokens // PAGE)


def _pool(like: torch.Tensor, pages: int) -> torch.Tensor:
    """Empty pages for keys or values [rows, heads, width, size]; not even masked numbers may be infinite."""
    return like.new_zeros(pages, PAGE, like.shape[1], like.shape[3])
