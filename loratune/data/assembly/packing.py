"""Which sequences share a row of a training batch, so that no position goes to padding."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 500
"""One row more than must be, of so many, is not worth another search."""


def spread(lengths: Sequence[int] | NDArray[np.integer], rows: int) -> list[list[int]]:
    """A number of rows with nearly the same tokens in each, and long and short sequences in all of them.

    The longest first, each goes to the row that has the fewest tokens (Graham's rule for even loads, SIAM Journal on
    Applied Mathematics 17, 1969: the fullest row has at most 4/3 of what it must have). Bins of a best fit would hold
    sequences of one length each, and a step on the shortest is another lesson than one on the longest.

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


def spread_within(lengths: Sequence[int] | NDArray[np.integer], capacity: int) -> list[list[int]]:
    """As few rows as `spread` keeps within a capacity, or one in 500 more.

    What the tokens would fill is where the search begins. It takes ever larger steps until the rows fit, and then
    halves the last one.

    Args:
        lengths: tokens of each sequence.
        capacity: tokens that a row holds.

    Raises:
        ValueError: a sequence is longer than a row.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.max(initial=0) > capacity:
        raise ValueError(f"sequence {sizes.argmax()} has {sizes.max()} tokens, a row holds {capacity}")

    def tried(count: int) -> list[list[int]] | None:
        rows = spread(sizes, count)
        return rows if all(int(sizes[members].sum()) <= capacity for members in rows) else None

    count = math.ceil(int(sizes.sum()) / capacity)
    too_few, step = count - 1, 1 + count // 100
    while (rows := tried(count)) is None:
        too_few, count, step = count, min(count + step, len(sizes)), 2 * step
    while count - too_few > 1 + count // TOLERANCE:
        middle = (too_few + count) // 2
        fewer = tried(middle)
        if fewer is None:
            too_few = middle
        else:
            rows, count = fewer, middle
    return rows


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
