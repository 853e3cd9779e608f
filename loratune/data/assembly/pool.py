"""The rows of several sources together: cleaned, mixed and split by number, while their ids stay where they lie."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loratune.data.encoding.loaded_source import LoadedSource

Indices = NDArray[np.int64]
EXCERPT_CHARACTERS = 40


@dataclass(frozen=True)
class Pool:
    """Rows of some sources, in their order; a row may stand there several times."""

    sources: Sequence[LoadedSource]
    source: Indices
    """Of each row, the number of its source."""
    row: Indices
    """Of each row, its place among the rows of its source."""

    @classmethod
    def of(cls, sources: Sequence[LoadedSource]) -> Pool:
        """All rows of some sources, each once."""
        counts = [len(loaded.rows) for loaded in sources]
        row = np.concatenate([np.arange(count) for count in counts]) if counts else np.zeros(0, np.int64)
        return cls(sources, np.repeat(np.arange(len(counts)), counts), row)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.row)

    def take(self, chosen: NDArray[Any]) -> Pool:
        """Some of the rows, by their places or by a mask."""
        return Pool(self.sources, self.source[chosen], self.row[chosen])

    @cached_property
    def digests(self) -> NDArray[np.uint64]:
        """Of each row, a hash of its messages."""
        return self.of_each_row("digests", np.uint64)

    def of_each_row(self, name: str, kind: Any = np.int64) -> NDArray[Any]:
        """One of the arrays that `EncodedRows` has of its rows, for these rows."""
        values = np.zeros(len(self), kind)
        for number, loaded in enumerate(self.sources):
            mine = self.source == number
            values[mine] = getattr(loaded.rows, name)[self.row[mine]]
        return values

    def has_usable_sequence(self, max_length: int) -> NDArray[np.bool_]:
        """Of each row, whether a sequence of it can be trained on."""
        usable = np.zeros(len(self), bool)
        for number, loaded in enumerate(self.sources):
            mine, rows = self.source == number, loaded.rows
            if len(rows):
                fits = (rows.tokens <= max_length) & (rows.trained > 0)
                usable[mine] = np.logical_or.reduceat(fits, rows.starts)[self.row[mine]]
        return usable

    def sequences(self, number: int) -> Indices:
        """Places of the sequences that the rows of one source have, in the order of the rows."""
        rows = self.sources[number].rows
        mine = self.row[self.source == number]
        ends = np.append(rows.starts, len(rows.table))
        counts = ends[mine + 1] - ends[mine]
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        sequences: Indices = np.repeat(ends[mine], counts) + offsets
        return sequences

    def place(self, index: int) -> str:
        """Where a row stands and how it begins, for messages."""
        return place_of(self.sources[self.source[index]], int(self.row[index]))

    def short_place(self, index: int) -> str:
        """Where a row stands."""
        return _short_place(self.sources[self.source[index]], int(self.row[index]))

    def input_ids(self, index: int) -> NDArray[np.int32]:
        """The ids of a row's first sequence."""
        ids: NDArray[np.int32] = self.sources[self.source[index]].rows.input_ids(int(self.row[index]))
        return ids

    def prompt_ids(self, index: int) -> NDArray[np.int32]:
        """The ids of a row before its first trained one."""
        ids: NDArray[np.int32] = self.sources[self.source[index]].rows.prompt_ids(int(self.row[index]))
        return ids

    def messages(self, index: int) -> list[dict[str, Any]]:
        """The conversation of a row."""
        messages: list[dict[str, Any]] = self.sources[self.source[index]].rows.messages(int(self.row[index]))
        return messages


def place_of(loaded: LoadedSource, row: int) -> str:
    """Where a row of a source stands and how it begins, for messages."""
    question = next((turn["content"] for turn in loaded.rows.messages(row) if turn["role"] == "user"), "")
    excerpt = " ".join(question[: EXCERPT_CHARACTERS + 1].split())
    shown = excerpt if len(question) <= EXCERPT_CHARACTERS else f"{excerpt[:EXCERPT_CHARACTERS]}…"
    return f"{_short_place(loaded, row)} «{shown}»"


def _short_place(loaded: LoadedSource, row: int) -> str:
    place: str = loaded.file.place(int(loaded.rows.numbers[row]))
    return place


def earlier_copies(digests: NDArray[np.uint64]) -> Indices:
    """Of each row, the place of the first one equal to it, which may be itself."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    found: Indices = first[inverse]
    return found


def mix(pool: Pool, seed: int) -> NDArray[np.int64]:
    """How often each row is taken: as often as its source is repeated, and in the proportion of the sources' weights.

    Without weights all rows are taken. With them the source that is scarcest for its weight is taken whole and of the
    others as many rows are drawn as keep the proportion; nothing is repeated but what the recipe repeats.
    """
    sizes = np.bincount(pool.source, minlength=len(pool.sources))
    available = np.array([size * loaded.source.repeat for size, loaded in zip(sizes, pool.sources, strict=True)])
    weights = [loaded.source.weight for loaded in pool.sources]
    wanted = available
    if all(weights):
        shares = np.array(weights, dtype=float)
        wanted = np.minimum(available, np.round(shares * (available / shares).min()).astype(np.int64))
    times = np.zeros(len(pool), np.int64)
    for number, (size, count) in enumerate(zip(sizes, wanted, strict=True)):
        if size:
            mine = np.flatnonzero(pool.source == number)
            times[mine] = count // size
            times[mine[random.Random(seed).sample(range(size), int(count % size))]] += 1
    return times


def draw_validation(pool: Pool, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which rows are held out: the same share of every source, at least one row where one can be spared."""
    held_out = np.zeros(len(pool), bool)
    total = min(max(1, round(len(pool) * fraction)), len(pool) - 1) if fraction else 0
    if total <= 0:
        return held_out
    sizes = np.bincount(pool.source, minlength=len(pool.sources))
    exact = sizes * total / len(pool)
    counts = exact.astype(np.int64)
    largest_rests = np.argsort(counts - exact, kind="stable")[: total - counts.sum()]
    counts[largest_rests] += 1
    for number, count in enumerate(counts):
        mine = np.flatnonzero(pool.source == number)
        held_out[mine[random.Random(seed).sample(range(len(mine)), int(count))]] = True
    return held_out
