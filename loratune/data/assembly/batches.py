"""Rows of a dataset as the batches of a training step: packed without padding, or padded among rows of like length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray

from loratune.data.encoding.encoder import IGNORED
from loratune.multiples import round_up


class PackedRows(torch.utils.data.Dataset):
    """Several sequences of a dataset as one row.

    Args:
        rows: columns input_ids and labels, a line per sequence.
        bins: for each row, the lines that share it.
    """

    def __init__(self, rows: Dataset, bins: list[list[int]]) -> None:
        self.rows = rows
        self.bins = bins

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        """A row's input_ids, its labels, the lengths of the documents in it and their numbers.

        No document's first token has a label, which the document before it would have to predict.
        """
        documents = self.rows[self.bins[row]]
        return {
            "input_ids": list(chain.from_iterable(documents["input_ids"])),
            "labels": list(chain.from_iterable([IGNORED, *labels[1:]] for labels in documents["labels"])),
            "lengths": [len(ids) for ids in documents["input_ids"]],
            "sequences": self.bins[row],
        }


class NumberedRows(torch.utils.data.Dataset):
    """The rows of a dataset, each with its number.

    Args:
        rows: columns input_ids and labels, a line per sequence.
    """

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        """A row's input_ids and labels, and its number as a list."""
        return {**self.rows[row], "sequences": [row]}


def round_length(tokens: int) -> int:
    """The next of the few lengths that batches have: up to 3 % longer, 32 of them from a power of two to the next.

    oneDNN compiles each matrix product for its shape and keeps it: with lengths of all kinds, every training step would
    leave some 40 MB behind and spend a twentieth of its time on that.
    """
    unit = max(1, 1 << max(0, tokens.bit_length() - 6))
    return round_up(tokens, unit)


def collate_packed(items: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
    """All documents of some rows of PackedRows in one row, with their borders as flash attention takes them.

    What is missing to one of the few lengths of batches is a last document without labels.

    Returns:
        input_ids, labels and position_ids, int64 [1, tokens]; the positions start anew with each document.
        cu_seq_lens_q and cu_seq_lens_k, int32 [documents + 1], where documents begin and the last one ends.
        max_length_q and max_length_k, the longest document.
        seq_idx, int32 [1, tokens], the number of each token's document, as layers with a state of their own take it.
        transformers refuses it where such a layer cannot keep documents apart; attention does without it.
        about, which is not for the model: the numbers of the `sequences`, and the length of the `filling` document.
    """
    lengths = [length for item in items for length in item["lengths"]]
    sequences = [number for item in items for number in item["sequences"]]
    filling = round_length(sum(lengths)) - sum(lengths)
    if filling:
        lengths.append(filling)
        items = [*items, {"input_ids": [0] * filling, "labels": [IGNORED] * filling}]
    ends = np.cumsum([0, *lengths], dtype=np.int32)
    batch: dict[str, Any] = {
        name: torch.tensor([list(chain.from_iterable(item[name] for item in items))])
        for name in ("input_ids", "labels")
    }
    batch["about"] = {"sequences": sequences, "filling": filling}
    batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    batch["seq_idx"] = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))[None]
    for side in ("q", "k"):
        batch[f"cu_seq_lens_{side}"] = torch.from_numpy(ends.copy())
        batch[f"max_length_{side}"] = max(lengths)
    return batch


def collate_padded(items: Sequence[dict[str, list[int]]], pad_token_id: int) -> dict[str, Any]:
    """Sequences as rows of one of the few lengths of batches, filled up on the right.

    Returns:
        input_ids, labels and attention_mask (1 for tokens), int64 [sequences, length].
        about, which is not for the model: the numbers of the `sequences`.
    """
    shape = (len(items), round_length(max(len(item["input_ids"]) for item in items)))
    batch: dict[str, Any] = {
        "input_ids": torch.full(shape, pad_token_id),
        "labels": torch.full(shape, IGNORED),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
    }
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        batch["input_ids"][row, :length] = torch.tensor(item["input_ids"])
        batch["labels"][row, :length] = torch.tensor(item["labels"])
        batch["attention_mask"][row, :length] = 1
    batch["about"] = {"sequences": [number for item in items for number in item["sequences"]], "filling": 0}
    return batch


class LengthSortedBatches:
    """A batch sampler that puts rows of like length together, anew in each epoch, every row once.

    Rows are shuffled, then sorted within windows of some batches, then the batches are shuffled. So a batch needs
    little padding, and what is in it and when it comes is still up to chance.

    Args:
        lengths: tokens of each row.
        batch_size: rows in a batch; the last one of an epoch may have fewer.
        seed: of the order, together with the epoch.
        window: batches that are sorted together.
    """

    drop_last = False

    def __init__(
        self, lengths: Sequence[int] | NDArray[np.integer], batch_size: int, seed: int, window: int = 50
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batch_size = batch_size
        self.seed = seed
        self.window = window
        self.epoch = 0

    @property
    def sampler(self) -> LengthSortedBatches:
        """Itself: where accelerate shares the batches among processes, it tells the epoch to this attribute only."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is gone through next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.lengths))
        # Accelerate loses batches if a smaller one comes before the end.
        order, left = np.split(order, [len(order) // self.batch_size * self.batch_size])
        batches: list[list[int]] = []
        for start in range(0, len(order), self.batch_size * self.window):
            rows = order[start : start + self.batch_size * self.window]
            rows = rows[np.argsort(self.lengths[rows], kind="stable")]
            batches += rows.reshape(-1, self.batch_size).tolist()
        for place in random.permutation(len(batches)).tolist():
            yield batches[place]
        if len(left):
            yield left.tolist()
