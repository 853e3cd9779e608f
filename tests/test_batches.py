"""Passes and steps against plain lists: what a batch holds, and which rows share a step."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import DataLoaderShard
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from loratune.data.assembly.batches import PassRows, collate_packed, collate_padded, collate_step, round_length
from loratune.data.assembly.packing import spread_within
from loratune.data.assembly.steps import ALIKE, PassLayout, StepSampler
from loratune.data.encoding.encoder import IGNORED

IDS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]
LABELS = [[1, 2, 3], [4], [-100, -100, 7, 8, 9], [-100, 11]]
ROWS = PassRows(Dataset.from_dict({"input_ids": IDS, "labels": LABELS}))
NUMBERS = st.lists(st.integers(1, 300), max_size=400)
FEWER = st.lists(st.integers(1, 300), min_size=1, max_size=60)


def test_a_packed_pass_joins_its_sequences_in_order_and_predicts_no_first_token() -> None:
    batch = collate_packed(ROWS[[2, 0]])
    assert {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9, 1, 2, 3]],
        "labels": [[-100, -100, 7, 8, 9, -100, 2, 3]],
        "position_ids": [[0, 1, 2, 3, 4, 0, 1, 2]],
        "cu_seq_lens_q": [0, 5, 8],
        "cu_seq_lens_k": [0, 5, 8],
        "max_length_q": 5,
        "max_length_k": 5,
        "document_lengths": [5, 3],
        "seq_idx": [[0, 0, 0, 0, 0, 1, 1, 1]],
        "about": {"sequences": [2, 0], "tokens": 8},
    }
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "labels", "position_ids"))
    assert all(batch[name].dtype == torch.int32 for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"))


@given(NUMBERS.filter(bool))
def test_every_sequence_of_a_packed_data_set_is_found_between_borders(lengths: list[int]) -> None:
    sequences = [[number] * length for number, length in enumerate(lengths)]
    rows = PassRows(Dataset.from_dict({"input_ids": sequences, "labels": sequences}))
    found = []
    for members in spread_within(lengths, 600):
        batch = collate_packed(rows[members])
        borders = batch["cu_seq_lens_q"].tolist()
        tokens = sum(lengths[number] for number in members)
        assert batch["about"] == {"sequences": members, "tokens": tokens}
        filling = batch["input_ids"].numel() - tokens
        if filling:
            *borders, end = borders
            assert filling == end - borders[-1]
            assert (batch["labels"][0, borders[-1] :] == IGNORED).all()
        assert filling <= borders[-1] / 32
        found += [batch["input_ids"][0, start:end].tolist() for start, end in pairwise(borders)]
        assert batch["max_length_q"] == max(batch["cu_seq_lens_q"].diff().tolist())
        assert batch["seq_idx"].shape == batch["input_ids"].shape
        assert batch["seq_idx"][0].bincount().tolist() == batch["cu_seq_lens_q"].diff().tolist()
        assert (batch["seq_idx"][0].diff() >= 0).all()
    assert sorted(found) == sequences


def test_batches_have_few_lengths_little_longer_than_asked() -> None:
    for tokens in range(1, 5000):
        assert tokens <= round_length(tokens) <= tokens * 33 / 32
    assert len({round_length(tokens) for tokens in range(1024, 2048)}) == 33
    assert [round_length(tokens) for tokens in (1, 63, 64, 65, 1000, 1024, 1025)] == [1, 63, 64, 66, 1008, 1024, 1056]


def test_a_padded_pass_is_filled_up_on_the_right() -> None:
    batch = collate_padded(ROWS[[0, 1, 3]], pad_token_id=99)
    assert batch.pop("about") == {"sequences": [0, 1, 3], "tokens": 6}
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[1, 2, 3], [4, 99, 99], [10, 11, 99]],
        "labels": [[1, 2, 3], [4, -100, -100], [-100, 11, -100]],
        "attention_mask": [[1, 1, 1], [1, 0, 0], [1, 1, 0]],
    }
    assert all(value.dtype == torch.int64 for value in batch.values())


@pytest.mark.parametrize("collate", [collate_packed, lambda rows: collate_padded(rows, pad_token_id=99)])
def test_a_step_counts_the_positions_that_are_trained(collate: Any) -> None:
    """A sequence's first token is never predicted."""
    step = collate_step([ROWS[[0, 2]], ROWS[[3]], ROWS[[1]]], collate)
    assert [batch["about"]["sequences"] for batch in step["passes"]] == [[0, 2], [3], [1]]
    assert step["labelled"] == 2 + 3 + 1 + 0


@pytest.mark.parametrize("collate", [collate_packed, lambda rows: collate_padded(rows, pad_token_id=99)])
def test_a_process_without_rows_has_a_pass_without_labels(collate: Any) -> None:
    step = collate_step([ROWS[[]]], collate)
    assert step["labelled"] == 0
    (batch,) = step["passes"]
    assert batch["about"] == {"sequences": [], "tokens": 0}
    assert batch["input_ids"].numel() == 1


@given(NUMBERS, st.integers(1, 40), st.booleans(), st.integers(1, 3))
def test_every_row_comes_once_in_an_epoch_and_a_step_has_as_many_rows_as_asked(
    lengths: list[int], batch_size: int, is_packed: bool, processes: int
) -> None:
    samplers = [
        StepSampler(lengths, batch_size, 1, PassLayout(600, 100, is_packed, processes, process))
        for process in range(processes)
    ]
    steps = list(zip(*samplers, strict=True))
    rows = [[row for passes in step for one in passes for row in one] for step in steps]
    assert sorted(row for step in rows for row in step) == list(range(len(lengths)))
    assert len(steps) == len(samplers[0])
    assert all(len(step) == batch_size for step in rows[:-1])


@given(FEWER, st.integers(1, 900), st.booleans(), st.integers(1, 3))
def test_a_pass_has_no_more_tokens_than_asked_or_the_longest_row(
    lengths: list[int], tokens: int, is_packed: bool, processes: int
) -> None:
    for process in range(processes):
        for members in PassLayout(tokens, 50, is_packed, processes, process).passes(np.array(lengths)):
            sizes = [lengths[row] for row in members]
            held = sum(sizes) if is_packed else max(sizes, default=0) * len(sizes)
            assert held <= max(tokens, *lengths, 0)


@given(FEWER)
def test_padded_passes_hold_rows_of_like_length_unless_they_are_small(lengths: list[int]) -> None:
    for members in PassLayout(10_000, 500, is_packed=False).passes(np.array(lengths)):
        sizes = sorted(lengths[row] for row in members)
        assert sizes[0] >= ALIKE * sizes[-1] or (len(sizes) - 1) * sizes[-1] < 500


def rows_of_steps(epoch: int, seed: int = 1, **layout: Any) -> list[set[int]]:
    lengths = [1 + number * 7919 % 1000 for number in range(200)]
    sampler = StepSampler(
        lengths, 8, seed, PassLayout(**{"tokens": 3000, "efficient_tokens": 9, "is_packed": True} | layout)
    )
    sampler.set_epoch(epoch)
    return [{row for one in passes for row in one} for passes in sampler]


def test_the_rows_of_a_step_hang_on_seed_and_epoch_alone() -> None:
    assert rows_of_steps(2) == rows_of_steps(2)
    assert rows_of_steps(2) != rows_of_steps(2, seed=2)
    for layout in ({"tokens": 700}, {"is_packed": False}):
        assert rows_of_steps(2, **layout) == rows_of_steps(2)
    shares = [rows_of_steps(2, processes=2, process=process) for process in range(2)]
    assert [mine | other for mine, other in zip(*shares, strict=True)] == rows_of_steps(2)


@pytest.mark.parametrize("is_packed", [True, False])
def test_processes_get_nearly_the_same_number_of_tokens(is_packed: bool) -> None:
    """The one with most is waited for; dealt by rows in turn, a third of all time would be waiting."""
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 640).astype(np.int64) + 8
    steps = np.random.default_rng(1).permutation(len(lengths)).reshape(-1, 64)

    def idle(shares: list[list[int]]) -> float:
        return 1 - sum(map(sum, shares)) / (len(shares) * max(map(sum, shares)))

    def dealt(rows: Any) -> list[list[int]]:
        layouts = [PassLayout(4096, 512, is_packed, 8, process) for process in range(8)]
        return [[int(lengths[rows][row]) for one in layout.passes(lengths[rows]) for row in one] for layout in layouts]

    assert np.mean([idle(dealt(rows)) for rows in steps]) < 0.05
    assert np.mean([idle([lengths[rows[process::8]].tolist() for process in range(8)]) for rows in steps]) > 0.2


def test_rows_that_shared_a_step_are_parted_in_the_next_epoch() -> None:
    """Of 28 pairs in a step of 8 of 200 rows, 7 in 199 meet again by chance."""
    first, second = (
        {pair for step in rows_of_steps(epoch) for pair in combinations(sorted(step), 2)} for epoch in (0, 1)
    )
    assert len(first & second) < 3 * len(first) * 7 / 199


def test_a_step_is_a_random_sample_whatever_the_lengths() -> None:
    """Mean lengths of steps scatter as those of random rows do: by the standard deviation divided by √8."""
    lengths = np.array([1 + number * 7919 % 1000 for number in range(200)])
    means = [lengths[list(step)].mean() for epoch in range(20) for step in rows_of_steps(epoch)]
    assert np.std(means) == pytest.approx(lengths.std() / 8**0.5, rel=0.15)


def test_a_loader_goes_on_within_an_epoch_where_it_was_left() -> None:
    rows = PassRows(Dataset.from_dict({"input_ids": [[1]] * 21, "labels": [[1]] * 21}))
    sampler = StepSampler([5] * 21, 4, 1, PassLayout(10, 9, is_packed=True))
    loader = DataLoaderShard(rows, batch_sampler=sampler, collate_fn=list)
    loader.set_epoch(3)
    whole = list(loader)
    left = skip_first_batches(loader, 2)
    left.batch_sampler.batch_sampler.set_epoch(3)  # as transformers does
    assert list(left) == whole[2:]
