"""Finds near-duplicate rows by the Jaccard similarity of their token 5-grams.

MinHash signatures, split into bands (locality-sensitive hashing), select candidate pairs, which are then compared
exactly. Memory per row is four bytes per token plus a few hundred. Buckets exist only for bands that several rows
share; datasketch's MinHashLSH indexes all rows and takes some kilobytes for each.
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
"""Minimum recall for pairs exactly at the threshold; more similar pairs are nearly always found."""
DEVIATIONS = 4
"""Candidates are dropped if their estimate is this many standard deviations below the threshold."""
REPORTED_ROWS = 1000
# Odd multipliers: sums of products with them, modulo 2**64, distinguish sequences of different ids.
MULTIPLIERS = np.random.default_rng(0).integers(0, 2**63, PERMUTATIONS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)

Hashes = NDArray[np.uint32]
Bucket = list[int]
"""Rows that share a band and have no earlier near duplicate."""


@dataclass(frozen=True)
class _Rows:
    """Hashes of all rows."""

    shingles: list[Hashes]
    signatures: NDArray[np.uint8]
    """The lowest byte of each MinHash value of a row; the share of equal bytes estimates the similarity."""
    bands: NDArray[np.uint64]
    """A hash of each band of a row's signature."""


def find_near_duplicates(
    rows: Iterable[TokenIds], threshold: float, progress: Callable[[int], None], known: int = 0
) -> list[tuple[int, int]]:
    """Return pairs of a row and the earliest row that it resembles, ordered by the first.

    The second row of a pair is never the first of another one: removing the first row of each pair leaves no near
    duplicates.

    Args:
        rows: token ids of each row.
        threshold: minimum similarity of near duplicates, from 0 to 1.
        progress: called with the number of rows read since the previous call.
        known: number of rows at the beginning that are not compared with each other, and all stay.
    """
    read = _read(rows, threshold, progress)
    buckets = _shared_buckets(read.bands)
    pairs = []
    for row in sorted(buckets):
        if row >= known:
            candidates = {earlier for bucket in buckets[row] for earlier in bucket}
            earliest = _earliest_similar(read, row, candidates, threshold)
            if earliest is not None:
                pairs.append((row, earliest))
                continue
        for bucket in buckets[row]:
            bucket.append(row)
    return pairs


def shingle_hashes(ids: TokenIds) -> Hashes:
    """Return the sorted, unique hashes of all 5-grams, or of the whole sequence if it is shorter."""
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
    shingles, signatures, keys, reported = [], [], [], 0
    for ids in rows:
        hashes = shingle_hashes(ids)
        sketch.clear()
        sketch.update_batch(hashes.tolist())
        shingles.append(hashes)
        signatures.append(sketch.hashvalues.astype(np.uint8))
        keys.append(sketch.hashvalues[: bands * width].reshape(bands, width).astype(np.uint64) @ MULTIPLIERS[:width])
        if len(keys) - reported == REPORTED_ROWS:
            progress(REPORTED_ROWS)
            reported = len(keys)
    progress(len(keys) - reported)
    return _Rows(
        shingles,
        np.array(signatures, np.uint8).reshape(len(keys), PERMUTATIONS),
        np.array(keys, np.uint64).reshape(len(keys), bands),
    )


def _shared_buckets(bands: NDArray[np.uint64]) -> dict[int, list[Bucket]]:
    """Return, for every row that shares a band with another, its buckets, which are still empty."""
    buckets: dict[int, list[Bucket]] = defaultdict(list)
    for band in bands.T:
        _, groups, sizes = np.unique(band, return_inverse=True, return_counts=True)
        shared = np.flatnonzero(sizes[groups] > 1)
        of_group: dict[int, Bucket] = defaultdict(list)
        for row, group in zip(shared.tolist(), groups[shared].tolist(), strict=True):
            buckets[row].append(of_group[group])
    return buckets


def _earliest_similar(read: _Rows, row: int, candidates: set[int], threshold: float) -> int | None:
    """Return the earliest candidate above the threshold, or None.

    Estimates filter first: rows of one template share many bands without being similar, and exact comparison of all of
    them takes a hundred times as long.
    """
    ordered = np.array(sorted(candidates), dtype=np.int64)
    estimates = (read.signatures[ordered] == read.signatures[row]).mean(axis=1)
    least = threshold - DEVIATIONS * (threshold * (1 - threshold) / PERMUTATIONS) ** 0.5
    likely = (int(earlier) for earlier in ordered[estimates >= least])
    mine = read.shingles[row]
    return next((earlier for earlier in likely if _jaccard(read.shingles[earlier], mine) >= threshold), None)


def _bands(threshold: float) -> tuple[int, int]:
    """Return number and width of the bands: the widest that reach RECALL, because wider bands give fewer candidates."""
    for width in range(PERMUTATIONS, 1, -1):
        bands = PERMUTATIONS // width
        if 1 - (1 - threshold**width) ** bands >= RECALL:
            return bands, width
    return PERMUTATIONS, 1


def _jaccard(one: Hashes, other: Hashes) -> float:
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / max(1, len(one) + len(other) - common)
