"""Packed and padded batches against plain lists, and the order of batches of like length."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from loratune.data.assembly.batches import (
    LengthSortedBatches,
    NumberedRows,
    PackedRows,
    collate_packed,
    collate_padded,
    round_length,
)
from loratune.data.assembly.packing import spread_within
from loratune.data.encoding.encoder import IGNORED

IDS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11]]
LABELS = [[1, 2, 3], [4], [-100, -100, 7, 8, 9], [-100, 11]]
ROWS = Dataset.from_dict({"input_ids": IDS, "labels": LABELS})
NUMBERS = st.lists(st.integers(1, 300), max_size=400)


def test_a_packed_row_joins_its_sequences_in_order_and_predicts_no_first_token() -> None:
    rows = PackedRows(ROWS, [[2, 0], [3, 1]])
    assert len(rows) == 2
    assert rows[0] == {
        "input_ids": [5, 6, 7, 8, 9, 1, 2, 3],
        "labels": [-100, -100, 7, 8, 9, -100, 2, 3],
        "lengths": [5, 3],
        "sequences": [2, 0],
    }
    assert rows[1] == {"input_ids": [10, 11, 4], "labels": [-100, 11, -100], "lengths": [2, 1], "sequences": [3, 1]}


def test_one_packed_row_is_a_batch_with_its_borders() -> None:
    batch = collate_packed([PackedRows(ROWS, [[2, 0]])[0]])
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
        "about": {"sequences": [2, 0], "filling": 0},
    }
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "labels", "position_ids"))
    assert all(batch[name].dtype == torch.int32 for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"))


def test_several_packed_rows_become_one() -> None:
    rows = PackedRows(ROWS, [[2, 0], [3, 1]])
    batch = collate_packed([rows[0], rows[1]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 2, 3, 10, 11, 4]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8, 9, -100, 2, 3, -100, 11, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 0]]
    assert batch["cu_seq_lens_k"].tolist() == [0, 5, 8, 10, 11]


@given(NUMBERS.filter(bool))
def test_every_sequence_of_a_packed_data_set_is_found_between_borders(lengths: list[int]) -> None:
    sequences = [[number] * length for number, length in enumerate(lengths)]
    rows = PackedRows(Dataset.from_dict({"input_ids": sequences, "labels": sequences}), spread_within(lengths, 300))
    found = []
    for batch in DataLoader(rows, batch_size=2, collate_fn=collate_packed):
        borders = batch["cu_seq_lens_q"].tolist()
        filling = batch["about"]["filling"]
        if filling:
            *borders, end = borders
            assert filling == end - borders[-1]
            assert (batch["labels"][0, borders[-1] :] == IGNORED).all()
        assert filling <= borders[-1] / 32
        assert [sequences[number] for number in batch["about"]["sequences"]] == [
            batch["input_ids"][0, start:end].tolist() for start, end in pairwise(borders)
        ]
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


def test_a_padded_batch_is_filled_up_on_the_right() -> None:
    rows = NumberedRows(ROWS)
    batch = collate_padded([rows[0], rows[1], rows[3]], pad_token_id=99)
    assert batch.pop("about") == {"sequences": [0, 1, 3], "filling": 0}
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[1, 2, 3], [4, 99, 99], [10, 11, 99]],
        "labels": [[1, 2, 3], [4, -100, -100], [-100, 11, -100]],
        "attention_mask": [[1, 1, 1], [1, 0, 0], [1, 1, 0]],
    }
    assert all(value.dtype == torch.int64 for value in batch.values())


@given(NUMBERS, st.integers(1, 9), st.integers(1, 5))
def test_every_row_comes_once_in_an_epoch(lengths: list[int], batch_size: int, window: int) -> None:
    sampler = LengthSortedBatches(lengths, batch_size, seed=1, window=window)
    batches = list(sampler)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert len(batches) == len(sampler)
    assert all(len(batch) == batch_size for batch in batches[:-1])


def test_the_order_hangs_on_seed_and_epoch_alone() -> None:
    def batches(seed: int, epoch: int) -> list[list[int]]:
        sampler = LengthSortedBatches(list(range(1, 500)), 4, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert batches(1, 2) == batches(1, 2)
    assert batches(1, 2) != batches(1, 3)
    assert batches(1, 2) != batches(2, 2)


def test_batches_hold_rows_of_like_length_and_come_in_no_order_of_length() -> None:
    lengths = [1 + number * 7919 % 1000 for number in range(1000)]
    batches = [[lengths[row] for row in batch] for batch in LengthSortedBatches(lengths, 8, seed=1)]
    padded = sum(max(batch) * len(batch) for batch in batches)
    assert sum(lengths) / padded > 0.97
    rises = sum(first[0] < second[0] for first, second in pairwise(batches))
    assert 0.3 < rises / len(batches) < 0.7


@pytest.mark.parametrize("rows", [16, 17, 21])
def test_processes_share_the_batches_of_an_epoch(rows: int) -> None:
    shards = []
    for process in range(2):
        sampler = BatchSamplerShard(LengthSortedBatches([5] * rows, 4, seed=1), num_processes=2, process_index=process)
        loader = DataLoaderShard(list(range(rows)), batch_sampler=sampler, collate_fn=list)
        loader.set_epoch(3)
        shards.append(list(loader))
    expected = LengthSortedBatches([5] * rows, 4, seed=1)
    expected.set_epoch(3)
    together = [batch for pair in zip(*shards, strict=True) for batch in pair]
    assert together[: rows // 4] == list(expected)[: rows // 4]
    assert {row for batch in together for row in batch} == set(range(rows))
