"""Which sequences share a row of a training batch, so that no position goes to padding."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

WORD_BITS = 1024


def pack(lengths: Sequence[int] | NDArray[np.integer], capacity: int) -> list[list[int]]:
    """Rows of sequence numbers, by best fit of the longest first.

    Each sequence goes to the row that it fills best; which one among equally full rows is settled, too.

    Args:
        lengths: tokens of each sequence.
        capacity: tokens that a row holds.

    Raises:
        ValueError: a sequence is longer than a row.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    if len(sizes) and sizes[order[0]] > capacity:
        raise ValueError(f"sequence {order[0]} has {sizes[order[0]]} tokens, a row holds {capacity}")
    rows: list[list[int]] = []
    unfilled = _UnfilledRows(capacity)
    for sequence, length in zip(order.tolist(), sizes[order].tolist(), strict=True):
        space = unfilled.smallest_space(length)
        if space is None:
            space, row = capacity, len(rows)
            rows.append([])
        else:
            row = unfilled.take(space)
        rows[row].append(sequence)
        unfilled.put(row, space - length)
    return rows


def spread(lengths: Sequence[int] | NDArray[np.integer], rows: int) -> list[list[int]]:
    """A number of rows with nearly the same tokens in each, and long and short sequences in all of them.

    The longest first, each goes to the row that has the fewest tokens (Graham's rule for even loads, SIAM Journal on
    Applied Mathematics 17, 1969: the fullest row has at most 4/3 of what it must have). Rows of a best fit would be of
    one length each, and a step on the shortest sequences is another lesson than one on the longest.

    Args:
        lengths: tokens of each sequence.
        rows: at most as many as there are sequences.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    members: list[list[int]] = [[] for _ in range(rows)]
    loads = [(0, row) for row in range(rows)]
    for sequence, length in zip(order.tolist(), sizes[order].tolist(), strict=True):
        load, row = loads[0]
        members[row].append(sequence)
        heapq.heapreplace(loads, (load + length, row))
    return members


def padding_efficiency(lengths: Sequence[int] | NDArray[np.integer], batch_size: int, seed: int) -> float:
    """Share of positions that hold tokens if batches are drawn at random and padded to their longest sequence.

    Args:
        lengths: tokens of each sequence.
        batch_size: sequences in a batch.
        seed: of the order.
    """
    sizes = np.random.default_rng(seed).permutation(np.asarray(lengths, dtype=np.int64))
    starts = np.arange(0, len(sizes), batch_size)
    if not sizes.any():
        return 1.0
    longest = np.maximum.reduceat(sizes, starts)
    rows = np.diff(starts, append=len(sizes))
    return float(sizes.sum() / (longest * rows).sum())


class _UnfilledRows:
    """Rows by the space that they have left.

    Sets of spaces are bits of numbers, in two levels: one number for each thousand spaces, and one that tells which of
    these numbers are not zero. So the next larger space is found in the same time for every capacity in use.
    """

    def __init__(self, capacity: int) -> None:
        self._rows: list[list[int]] = [[] for _ in range(capacity + 1)]
        self._words = [0] * (capacity // WORD_BITS + 1)
        self._used_words = 0

    def smallest_space(self, length: int) -> int | None:
        """The smallest space of at least `length` that a row has; None if there is none."""
        place, bit = divmod(length, WORD_BITS)
        word = self._words[place] >> bit
        if word:
            return length + _lowest_bit(word)
        later = self._used_words >> (place + 1)
        if not later:
            return None
        place += 1 + _lowest_bit(later)
        return place * WORD_BITS + _lowest_bit(self._words[place])

    def take(self, space: int) -> int:
        """Take out the row that was put in last among those with this space."""
        row = self._rows[space].pop()
        if not self._rows[space]:
            place, bit = divmod(space, WORD_BITS)
            self._words[place] ^= 1 << bit
            if not self._words[place]:
                self._used_words ^= 1 << place
        return row

    def put(self, row: int, space: int) -> None:
        """Add a row; one without any space is never asked for."""
        if space == 0:
            return
        self._rows[space].append(row)
        place, bit = divmod(space, WORD_BITS)
        self._words[place] |= 1 << bit
        self._used_words |= 1 << place


def _lowest_bit(number: int) -> int:
    return (number & -number).bit_length() - 1
