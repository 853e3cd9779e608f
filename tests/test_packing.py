"""Best-fit-decreasing packing against a naive one, and the padding that batches need without it."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratune.data.assembly.packing import pack, padding_efficiency, spread

# Capacities on both sides of where the search goes on to a second number.
CAPACITIES = st.one_of(st.integers(1, 60), st.integers(1000, 1100), st.integers(4000, 5000))
PROBLEMS = CAPACITIES.flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=120), st.just(capacity))
)


def naive(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best fit decreasing, by looking at every row for every sequence."""
    rows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in rows if sum(row) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


@given(PROBLEMS)
def test_every_sequence_is_in_one_row_and_no_row_is_too_long(problem: tuple[list[int], int]) -> None:
    lengths, capacity = problem
    rows = pack(lengths, capacity)
    assert sorted(sequence for row in rows for sequence in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[sequence] for sequence in row) <= capacity for row in rows)


@given(PROBLEMS)
def test_packing_is_as_tight_as_looking_at_every_row(problem: tuple[list[int], int]) -> None:
    lengths, capacity = problem
    rows = pack(lengths, capacity)
    assert sorted(sum(lengths[sequence] for sequence in row) for row in rows) == sorted(map(sum, naive(*problem)))


@given(PROBLEMS)
def test_rows_are_few_where_the_tokens_tell_how_few_there_can_be(problem: tuple[list[int], int]) -> None:
    lengths, capacity = problem
    short = [length for length in lengths if 9 * length <= capacity]
    # Another row begins only once nothing fits into the others, so all but one are filled to eight ninths.
    assert len(pack(short, capacity)) <= math.ceil(sum(short) / capacity) * 11 / 9 + 1


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_at_most_two_ninths_more_than_a_perfect_packing_needs(seed: int) -> None:
    random = np.random.default_rng(seed)
    cuts = [np.diff([0, *sorted(random.choice(999, 5, replace=False) + 1), 1000]) for _ in range(60)]
    assert len(pack(random.permutation(np.concatenate(cuts)), 1000)) <= 60 * 11 / 9 + 1


def test_rows_are_filled_with_what_fits_best() -> None:
    assert pack([3, 7, 4, 6, 10], 10) == [[4], [1, 0], [3, 2]]
    assert pack([], 8) == []
    assert pack(np.array([8, 8], dtype=np.int32), 8) == [[0], [1]]


def test_packing_does_not_depend_on_anything_else() -> None:
    lengths = np.random.default_rng(3).integers(1, 2049, 5000)
    assert pack(lengths, 2048) == pack(lengths.tolist(), 2048)


def test_a_sequence_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence 1 has 9 tokens, a row holds 8"):
        pack([3, 9], 8)


def test_half_a_million_sequences_take_seconds() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 500_000).astype(int), 1, 2048)
    begin = time.process_time()
    rows = pack(lengths, 2048)
    assert time.process_time() - begin < 3
    assert lengths.sum() / (len(rows) * 2048) > 0.999


@given(PROBLEMS, st.integers(1, 40))
def test_spread_rows_are_even_and_hold_every_sequence_once(problem: tuple[list[int], int], count: int) -> None:
    lengths, _ = problem
    count = min(count, len(lengths)) or 1
    rows = spread(lengths, count)
    assert len(rows) == count
    assert sorted(sequence for row in rows for sequence in row) == list(range(len(lengths)))
    loads = [sum(lengths[sequence] for sequence in row) for row in rows]
    # Where a row has several sequences, it was the emptiest before the last and shortest of them came.
    for row, load in zip(rows, loads, strict=True):
        if len(row) > 1:
            assert load - min(lengths[sequence] for sequence in row) <= min(loads)


def test_long_and_short_sequences_are_in_every_row() -> None:
    lengths = np.random.default_rng(1).permutation(np.repeat([400, 100, 20], 50))
    for members in spread(lengths, 25):
        assert np.bincount(lengths[members])[[20, 100, 400]].tolist() == [2, 2, 2]


def test_half_a_million_sequences_are_spread_in_seconds() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 500_000).astype(int), 1, 2048)
    begin = time.process_time()
    rows = spread(lengths, 20_000)
    assert time.process_time() - begin < 5
    loads = [int(lengths[members].sum()) for members in rows]
    assert max(loads) < 1.05 * np.mean(loads)


def test_padding_efficiency_is_the_share_of_tokens_in_padded_batches() -> None:
    assert padding_efficiency([5, 5, 5, 5], 2, 0) == 1
    assert padding_efficiency([1, 3], 2, 0) == pytest.approx(4 / 6)
    assert padding_efficiency([1, 2, 4], 1, 0) == 1
    assert padding_efficiency([], 4, 0) == 1
    # Two rows share a batch, the third is alone.
    assert padding_efficiency([1, 2, 4], 2, 0) in [pytest.approx(7 / n) for n in (8, 9, 10)]


def test_padding_efficiency_draws_the_order_by_the_seed() -> None:
    lengths = np.random.default_rng(1).integers(1, 500, 1000)
    assert padding_efficiency(lengths, 8, 1) == padding_efficiency(lengths, 8, 1)
    assert padding_efficiency(lengths, 8, 1) != padding_efficiency(lengths, 8, 2)
    assert padding_efficiency(lengths, 1000, 1) == pytest.approx(lengths.mean() / lengths.max())
