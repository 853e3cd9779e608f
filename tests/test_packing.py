"""Even rows against bins of a best fit, and the padding that batches need without packing."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratune.data.assembly.packing import padding_efficiency, spread, spread_within

PROBLEMS = st.integers(1, 5000).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=120), st.just(capacity))
)


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Bins by best fit of the longest first, which are nearly as few as can be."""
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
    rows = spread_within(lengths, capacity)
    assert sorted(sequence for row in rows for sequence in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[sequence] for sequence in row) <= capacity for row in rows)


@given(PROBLEMS)
def test_no_fewer_rows_would_be_as_even_and_fit(problem: tuple[list[int], int]) -> None:
    lengths, capacity = problem
    rows = spread_within(lengths, capacity)
    fewer = spread(lengths, len(rows) - 1) if len(rows) > 1 else []
    assert len(rows) <= 1 or max(sum(lengths[sequence] for sequence in row) for row in fewer) > capacity


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    "draw",
    [
        lambda random: random.integers(1, 2049, 400),
        lambda random: np.clip(random.lognormal(5, 1, 400).astype(int), 1, 2048),
        lambda random: random.integers(1900, 2049, 400),
        lambda random: random.integers(1025, 1200, 400),
        lambda random: np.where(
            random.random(400) < 0.5, random.integers(20, 60, 400), random.integers(1500, 2048, 400)
        ),
    ],
    ids=["even", "like-texts", "nearly-full", "more-than-half", "long-and-short"],
)
def test_even_rows_are_hardly_more_than_bins_that_nothing_else_is_asked_of(seed: int, draw: Any) -> None:
    lengths = draw(np.random.default_rng(seed)).tolist()
    bins = len(best_fit(lengths, 2048))
    assert len(spread_within(lengths, 2048)) <= bins * 1.03 + 1


def test_a_row_is_as_full_as_can_be() -> None:
    assert spread_within([3, 7, 4, 6, 10], 10) == [[4], [1, 0], [3, 2]]
    assert spread_within([], 8) == []
    assert spread_within(np.array([8, 8], dtype=np.int32), 8) == [[0], [1]]


def test_rows_within_a_capacity_depend_on_nothing_else() -> None:
    lengths = np.random.default_rng(3).integers(1, 2049, 5000)
    assert spread_within(lengths, 2048) == spread_within(lengths.tolist(), 2048)


def test_a_sequence_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="sequence 1 has 9 tokens, a row holds 8"):
        spread_within([3, 9], 8)


def test_half_a_million_sequences_find_their_number_of_rows_in_seconds() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 500_000).astype(int), 1, 2048)
    begin = time.process_time()
    rows = spread_within(lengths, 2048)
    assert time.process_time() - begin < 20
    assert lengths.sum() / (len(rows) * 2048) > 0.98


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
