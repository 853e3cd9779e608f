"""Cleans, mixes and splits the rows of several sources by index; their token ids stay in the cache files."""

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
    """Rows of several sources, in order; a row may occur more than once."""

    sources: Sequence[LoadedSource]
    source: Indices
    """Index of each row's source."""
    row: Indices
    """Index of each row within its source."""

    @classmethod
    def of(cls, sources: Sequence[LoadedSource]) -> Pool:
        """Return a pool with every row of some sources, each once."""
        counts = [len(loaded.rows) for loaded in sources]
        row = np.concatenate([np.arange(count) for count in counts]) if counts else np.zeros(0, np.int64)
        return cls(sources, np.repeat(np.arange(len(counts)), counts), row)

    def __len__(self) -> int:
        return len(self.row)

    def take(self, chosen: NDArray[Any]) -> Pool:
        """Select rows by index or by mask."""
        return Pool(self.sources, self.source[chosen], self.row[chosen])

    @cached_property
    def digests(self) -> NDArray[np.uint64]:
        """Hash of each row's messages and tools."""
        return self.of_each_row("digests", np.uint64)

    def of_each_row(self, name: str, kind: Any = np.int64) -> NDArray[Any]:
        """Gather an attribute of `EncodedRows` for the rows of this pool.

        Args:
            name: name of an attribute with one value per row.
            kind: dtype of the result.
        """
        values = np.zeros(len(self), kind)
        for number, loaded in enumerate(self.sources):
            mine = self.source == number
            values[mine] = getattr(loaded.rows, name)[self.row[mine]]
        return values

    def has_usable_sequence(self, max_length: int) -> NDArray[np.bool_]:
        """Return a mask of the rows with at least one sequence that fits and has labels."""
        usable = np.zeros(len(self), bool)
        for number, loaded in enumerate(self.sources):
            mine, rows = self.source == number, loaded.rows
            if len(rows):
                fits = (rows.tokens <= max_length) & (rows.trained > 0)
                usable[mine] = np.logical_or.reduceat(fits, rows.starts)[self.row[mine]]
        return usable

    def sequences(self, number: int) -> Indices:
        """Return the indices of the sequences of one source's rows, in the order of the rows."""
        rows = self.sources[number].rows
        mine = self.row[self.source == number]
        ends = np.append(rows.starts, len(rows.table))
        counts = ends[mine + 1] - ends[mine]
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        sequences: Indices = np.repeat(ends[mine], counts) + offsets
        return sequences

    def place(self, index: int) -> str:
        """Return a row's file and line and the beginning of its question, for messages."""
        return place_of(self.sources[self.source[index]], int(self.row[index]))

    def short_place(self, index: int) -> str:
        """Return a row's file and line."""
        return _short_place(self.sources[self.source[index]], int(self.row[index]))

    def input_ids(self, index: int) -> NDArray[np.int32]:
        """Return the ids of a row's first sequence."""
        ids: NDArray[np.int32] = self.sources[self.source[index]].rows.input_ids(int(self.row[index]))
        return ids

    def prompt_ids(self, index: int) -> NDArray[np.int32]:
        """Return the ids that precede the first labelled token of a row."""
        ids: NDArray[np.int32] = self.sources[self.source[index]].rows.prompt_ids(int(self.row[index]))
        return ids

    def messages(self, index: int) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = self.sources[self.source[index]].rows.messages(int(self.row[index]))
        return messages


def place_of(loaded: LoadedSource, row: int) -> str:
    """Return the file and line of a source's row and the beginning of its question, for messages."""
    question = next((turn["content"] for turn in loaded.rows.messages(row) if turn["role"] == "user"), "")
    excerpt = " ".join(question[: EXCERPT_CHARACTERS + 1].split())
    shown = excerpt if len(question) <= EXCERPT_CHARACTERS else f"{excerpt[:EXCERPT_CHARACTERS]}…"
    return f"{_short_place(loaded, row)} «{shown}»"


def _short_place(loaded: LoadedSource, row: int) -> str:
    place: str = loaded.file.place(int(loaded.rows.numbers[row]))
    return place


def earlier_copies(digests: NDArray[np.uint64]) -> Indices:
    """For each row, return the index of the first row with the same digest, which may be the row itself."""
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    found: Indices = first[inverse]
    return found


def mix(pool: Pool, seed: int) -> NDArray[np.int64]:
    """Return how often each row is used, from the repeats and weights of the sources.

    Without weights, every row is used. With weights, the source with the fewest rows for its weight is used whole, and
    rows of the others are sampled to match the proportions. Only `repeat` uses a row more than once.
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
    """Return a mask of the rows to hold out: the same share of every source, and at least one row if possible."""
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
