"""Packs sequences into batch rows so that no position is padding."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 500
"""The search stops once the number of rows is within one part in 500 of the minimum."""


def spread(lengths: Sequence[int] | NDArray[np.integer], rows: int) -> list[list[int]]:
    """Distribute sequences over a number of rows with nearly equal token counts and a mix of lengths in each.

    This is Graham's longest-first rule (SIAM Journal on Applied Mathematics 17, 1969): sequences are taken longest
    first, and each goes to the row with the fewest tokens. The fullest row has at most 4/3 of the optimum. Best-fit
    bins would hold sequences of one length each, so that some steps would train on short answers only and others on
    long ones.

    Args:
        lengths: tokens of each sequence.
        rows: number of rows; some are empty if there are fewer sequences.
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
    """Distribute sequences with `spread` over as few rows as fit a capacity, or 1 in 500 more.

    The search starts at the number of rows that the tokens would fill exactly, takes growing steps until the rows fit,
    and bisects the last step.

    Args:
        lengths: tokens of each sequence.
        capacity: maximum tokens per row.

    Raises:
        ValueError: a sequence is longer than the capacity.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.max(initial=0) > capacity:
        raise ValueError(f"sequence {sizes.argmax()} has {sizes.max()} tokens, a row holds {capacity}")

    def tried(count: int) -> list[list[int]] | None:
        rows = spread(sizes, count)
        return rows if all(int(sizes[members].sum()) <= capacity for members in rows) else None

    count, most = math.ceil(int(sizes.sum()) / capacity), len(sizes)
    too_few, step = count - 1, 1 + count // 100
    while (rows := tried(count)) is None:
        too_few, count, step = count, min(count + step, most), 2 * step
    while count - too_few > 1 + count // TOLERANCE:
        middle = (too_few + count) // 2
        fewer = tried(middle)
        if fewer is None:
            too_few = middle
        else:
            rows, count = fewer, middle
    return rows


def padding_efficiency(lengths: Sequence[int] | NDArray[np.integer], batch_size: int, seed: int) -> float:
    """Estimate the share of non-padding positions if batches were drawn at random and padded to their longest sequence.

    Args:
        lengths: tokens of each sequence.
        batch_size: sequences per batch.
        seed: seeds the random order.
    """
    sizes = np.random.default_rng(seed).permutation(np.asarray(lengths, dtype=np.int64))
    starts = np.arange(0, len(sizes), batch_size)
    if not sizes.any():
        return 1.0
    longest = np.maximum.reduceat(sizes, starts)
    rows = np.diff(starts, append=len(sizes))
    return float(sizes.sum() / (longest * rows).sum())
