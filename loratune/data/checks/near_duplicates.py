"""Rows that say almost the same as an earlier one, by the share of token 5-grams that they have in common.

MinHash signatures, cut into bands, tell which rows might be similar; these are compared exactly. What is kept of a row
is four bytes for each token and some hundred besides: buckets are made only for bands that several rows share, as an
index of all rows (datasketch's MinHashLSH) would take some kilobytes a row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from datasketch import MinHash
from numpy.typing import NDArray

TokenIds = Sequence[int] | NDArray[np.int32]

SHINGLE_IDS = 5
PERMUTATIONS = 128
RECALL = 0.95
"""Share of the pairs just at the threshold that are found, at least; of more similar ones nearly all are."""
DEVIATIONS = 4
"""By how many standard deviations an estimate may fall short of the threshold."""
REPORTED_ROWS = 1000
# Odd numbers; sums of products with them, modulo 2**64, tell sequences of other numbers apart.
MULTIPLIERS = np.random.default_rng(0).integers(0, 2**63, PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)

Hashes = NDArray[np.uint32]
Bucket = list[int]
"""Rows that share a band and are like no earlier row."""


@dataclass(frozen=True)
class _Rows:
    """What is kept of all rows."""

    shingles: list[Hashes]
    signatures: NDArray[np.uint8]
    """The last byte of each of a row's minimal hashes, whose equal share estimates the similarity."""
    bands: NDArray[np.uint64]
    """A hash of each band of a row's signature."""


def find_near_duplicates(
    rows: Iterable[TokenIds], threshold: float, progress: Callable[[int], None]
) -> list[tuple[int, int]]:
    """Pairs of a row and the earliest row that it is similar to, in the order of the former.

    The latter is never itself the first of a pair: without the first rows of all pairs no two similar ones are left.

    Args:
        rows: token ids of each.
        threshold: similarity from which on two rows are near duplicates.
        progress: called with the number of rows that were read since the last call.
    """
    known = _read(rows, threshold, progress)
    buckets = _shared_buckets(known.bands)
    pairs = []
    for row in sorted(buckets):
        candidates = {earlier for bucket in buckets[row] for earlier in bucket}
        earliest = _earliest_similar(known, row, candidates, threshold)
        if earliest is not None:
            pairs.append((row, earliest))
            continue
        for bucket in buckets[row]:
            bucket.append(row)
    return pairs


def shingle_hashes(ids: TokenIds) -> Hashes:
    """Hashes of all runs of five ids, each once and in order; of all ids at once if there are fewer."""
    size = min(SHINGLE_IDS, len(ids))
    runs = len(ids) - size + 1 if size else 0
    numbers = np.asarray(ids, dtype=np.uint64) + np.uint64(1)
    sums = np.zeros(runs, np.uint64)
    for place in range(size):
        sums += numbers[place : place + runs] * MULTIPLIERS[place]
    return np.unique((sums >> np.uint64(32)).astype(np.uint32))


def _read(rows: Iterable[TokenIds], threshold: float, progress: Callable[[int], None]) -> _Rows:
    bands, width = _bands(threshold)
    sketch = MinHash(PERMUTATIONS, hashfunc=int)
    shingles, signatures, keys, told = [], [], [], 0
    for ids in rows:
        hashes = shingle_hashes(ids)
        sketch.clear()
        sketch.update_batch(hashes.tolist())
        shingles.append(hashes)
        signatures.append(sketch.hashvalues.astype(np.uint8))
        keys.append(sketch.hashvalues[: bands * width].reshape(bands, width).astype(np.uint64) @ MULTIPLIERS[:width])
        if len(keys) - told == REPORTED_ROWS:
            progress(REPORTED_ROWS)
            told = len(keys)
    progress(len(keys) - told)
    return _Rows(
        shingles,
        np.array(signatures, np.uint8).reshape(len(keys), PERMUTATIONS),
        np.array(keys, np.uint64).reshape(len(keys), bands),
    )


def _shared_buckets(bands: NDArray[np.uint64]) -> dict[int, list[Bucket]]:
    """The buckets, still empty, of every row that shares a band with another."""
    buckets: dict[int, list[Bucket]] = defaultdict(list)
    for band in bands.T:
        _, groups, sizes = np.unique(band, return_inverse=True, return_counts=True)
        shared = np.flatnonzero(sizes[groups] > 1)
        of_group: dict[int, Bucket] = defaultdict(list)
        for row, group in zip(shared.tolist(), groups[shared].tolist(), strict=True):
            buckets[row].append(of_group[group])
    return buckets


def _earliest_similar(known: _Rows, row: int, candidates: set[int], threshold: float) -> int | None:
    """The earliest candidate that is similar enough.

    Estimates come first: rows of one template share many bands without being similar, and comparing all of them takes
    a hundred times as long.
    """
    ordered = np.array(sorted(candidates), dtype=np.int64)
    estimates = (known.signatures[ordered] == known.signatures[row]).mean(axis=1)
    least = threshold - DEVIATIONS * (threshold * (1 - threshold) / PERMUTATIONS) ** 0.5
    likely = (int(earlier) for earlier in ordered[estimates >= least])
    mine = known.shingles[row]
    return next((earlier for earlier in likely if _jaccard(known.shingles[earlier], mine) >= threshold), None)


def _bands(threshold: float) -> tuple[int, int]:
    """Number and width of the bands: as wide as still finds enough pairs, so that few others are compared."""
    for width in range(PERMUTATIONS, 1, -1):
        bands = PERMUTATIONS // width
        if 1 - (1 - threshold**width) ** bands >= RECALL:
            return bands, width
    return PERMUTATIONS, 1


def _jaccard(one: Hashes, other: Hashes) -> float:
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / max(1, len(one) + len(other) - common)
