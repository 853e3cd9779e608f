"""Near duplicates against exact similarities of all pairs."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from loratune.data.checks.near_duplicates import find_near_duplicates, shingle_hashes


def shingles(ids: Sequence[int]) -> set[tuple[int, ...]]:
    size = min(5, len(ids))
    return {tuple(ids[place : place + size]) for place in range(len(ids) - size + 1)} if ids else set()


def similarity(one: set[tuple[int, ...]], other: set[tuple[int, ...]]) -> float:
    return len(one & other) / max(1, len(one | other))


def by_comparing_all(rows: list[list[int]], threshold: float) -> list[tuple[int, int]]:
    sets = [shingles(row) for row in rows]
    pairs: list[tuple[int, int]] = []
    unlike: list[int] = []
    for row, mine in enumerate(sets):
        earliest = next((earlier for earlier in unlike if similarity(sets[earlier], mine) >= threshold), None)
        if earliest is None:
            unlike.append(row)
        else:
            pairs.append((row, earliest))
    return pairs


def found(rows: list[list[int]], threshold: float = 0.8) -> list[tuple[int, int]]:
    return find_near_duplicates(rows, threshold, lambda _: None)


def row_of(seed: random.Random, length: int) -> list[int]:
    return [seed.randrange(1000) for _ in range(length)]


def changed(ids: list[int], seed: random.Random, changes: int) -> list[int]:
    """A copy with some ids replaced."""
    copy = list(ids)
    for place in seed.sample(range(len(copy)), changes):
        copy[place] = 5000 + seed.randrange(1000)
    return copy


@pytest.mark.parametrize("seed", range(5))
def test_clear_cases_are_found_as_by_comparing_all_pairs(seed: int) -> None:
    source = random.Random(seed)
    rows = [row_of(source, source.randrange(100, 300)) for _ in range(60)]
    # One change costs at most five of a hundred shingles and more; twenty leave less than two thirds.
    rows += [changed(source.choice(rows[:60]), source, source.choice([0, 1, 30])) for _ in range(60)]
    source.shuffle(rows)
    expected = by_comparing_all(rows, 0.8)
    assert len(expected) > 20
    assert found(rows) == expected


def test_pairs_are_similar_indeed_and_few_are_missed_at_any_threshold() -> None:
    source = random.Random(0)
    rows = []
    for _ in range(200):
        original = row_of(source, 100)
        rows += [original, changed(original, source, source.randrange(8))]
    for threshold in (0.5, 0.7, 0.8, 0.9):
        pairs = found(rows, threshold)
        expected = by_comparing_all(rows, threshold)
        assert set(pairs) <= set(expected)
        assert len(pairs) >= 0.93 * len(expected) > 0


def test_a_row_is_told_with_the_earliest_that_stays() -> None:
    source = random.Random(1)
    first = row_of(source, 200)
    rows = [row_of(source, 50), first, changed(first, source, 1), list(first), row_of(source, 80), list(first)]
    assert found(rows) == [(2, 1), (3, 1), (5, 1)]


def test_a_row_that_is_only_like_one_that_is_left_out_stays() -> None:
    ids = list(range(100))
    rows = [ids, ids[11:] + list(range(200, 211)), ids[22:] + list(range(200, 222))]
    first, second, third = map(shingles, rows)
    assert similarity(first, second) >= 0.75 <= similarity(second, third)
    assert similarity(first, third) < 0.75
    assert found(rows, 0.75) == [(1, 0)]


def test_known_rows_all_stay_and_later_ones_are_compared_with_each() -> None:
    ids = list(range(100))
    rows = [ids, ids[11:] + list(range(200, 211)), ids[22:] + list(range(200, 222))]
    assert find_near_duplicates(rows, 0.75, lambda _: None, known=2) == [(2, 1)]
    assert find_near_duplicates([*rows, rows[2]], 0.75, lambda _: None, known=3) == [(3, 1)]
    assert find_near_duplicates(rows, 0.75, lambda _: None, known=3) == []


def test_short_rows_are_near_duplicates_where_they_are_equal() -> None:
    assert found([[], [7], [7], [8], [1, 2, 3], [], [1, 2, 3], [3, 2, 1], [1, 2, 3, 4], [0, 1, 2, 3, 4], [7]]) == [
        (2, 1),
        (6, 4),
        (10, 1),
    ]


def test_the_result_does_not_depend_on_the_kind_of_rows() -> None:
    source = random.Random(2)
    rows = [row_of(source, 60) for _ in range(30)]
    rows += rows[::3]

    def arrays() -> Iterator[np.ndarray]:
        yield from (np.array(row, dtype=np.int32) for row in rows)

    assert find_near_duplicates(arrays(), 0.8, lambda _: None) == found(rows) == by_comparing_all(rows, 0.8)


def test_progress_counts_every_row() -> None:
    counts: list[int] = []
    find_near_duplicates(([n, n + 1, n + 2] for n in range(2500)), 0.8, counts.append)
    assert counts == [1000, 1000, 500]
    assert found([]) == []


def test_shingles_are_hashed_each_to_a_number_of_its_own() -> None:
    source = random.Random(3)
    ids = [source.randrange(20) for _ in range(5000)]
    hashes = shingle_hashes(ids)
    assert len(hashes) == len(shingles(ids))
    assert (np.diff(hashes.astype(np.int64)) > 0).all()


def test_many_equal_rows_take_no_longer_than_different_ones() -> None:
    row = list(range(20))
    assert found([row] * 3000) == [(later, 0) for later in range(1, 3000)]


def test_rows_of_one_template_are_told_apart() -> None:
    source = random.Random(4)
    template = row_of(source, 133)
    rows = [template + row_of(source, 67) for _ in range(200)]
    assert found([*rows, changed(rows[150], source, 1)]) == [(200, 150)]
