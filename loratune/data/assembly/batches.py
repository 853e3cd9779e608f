"""Training batches: packed without padding, or padded and grouped by length."""

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
    """A dataset whose items are packed: several sequences concatenated.

    Args:
        rows: dataset with columns input_ids and labels, one sequence per row.
        bins: for each item, the indices of its sequences in `rows`.
    """

    def __init__(self, rows: Dataset, bins: list[list[int]]) -> None:
        self.rows = rows
        self.bins = bins

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        """Return one packed item: input_ids, labels, and each document's length and sequence number.

        The first token of each document has no label, since the preceding document would have to predict it.
        """
        documents = self.rows[self.bins[row]]
        return {
            "input_ids": list(chain.from_iterable(documents["input_ids"])),
            "labels": list(chain.from_iterable([IGNORED, *labels[1:]] for labels in documents["labels"])),
            "lengths": [len(ids) for ids in documents["input_ids"]],
            "sequences": self.bins[row],
        }


class NumberedRows(torch.utils.data.Dataset):
    """A dataset that adds each sequence's number to it.

    Args:
        rows: dataset with columns input_ids and labels, one sequence per row.
    """

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        return {**self.rows[row], "sequences": [row]}


def round_length(tokens: int) -> int:
    """Round a number of tokens up to one of few batch lengths: 32 per power of two, so at most 3 % longer.

    oneDNN compiles a kernel for each matrix shape and caches it. With arbitrary lengths, every training step would leak
    about 40 MB and spend 5 % of its time compiling.
    """
    unit = max(1, 1 << max(0, tokens.bit_length() - 6))
    return round_up(tokens, unit)


def collate_packed(items: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
    """Concatenate items of PackedRows into one batch row, with document boundaries in flash attention's format.

    A filler document without labels extends the batch to the next size of `round_length`.

    Returns:
        input_ids, labels and position_ids, int64 [1, tokens]; positions restart at each document.
        cu_seq_lens_q and cu_seq_lens_k, int32 [documents + 1]: cumulative document lengths, starting at 0.
        max_length_q and max_length_k: length of the longest document.
        document_lengths: length of each document, so that nobody has to fetch them from a GPU.
        seq_idx, int32 [1, tokens]: index of each token's document, for layers with a recurrent state. transformers
        raises
            an error where such a layer cannot keep documents apart; attention layers ignore it.
        about: not a model input; the `sequences` numbers and the length of the `filling` document.
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
    batch["document_lengths"] = lengths
    for side in ("q", "k"):
        batch[f"cu_seq_lens_{side}"] = torch.from_numpy(ends.copy())
        batch[f"max_length_{side}"] = max(lengths)
    return batch


def collate_padded(items: Sequence[dict[str, list[int]]], pad_token_id: int) -> dict[str, Any]:
    """Pad sequences on the right to one of the lengths of `round_length`.

    Returns:
        input_ids, labels and attention_mask (1 for tokens), int64 [sequences, length].
        about: not a model input; the `sequences` numbers.
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
    """A batch sampler that groups sequences of similar length and uses each once per epoch.

    Each epoch shuffles the sequences, sorts them by length within windows of several batches, and shuffles the batches.
    Batches need little padding, while their contents and order stay random.

    Args:
        lengths: tokens of each sequence.
        batch_size: sequences per batch; the last batch of an epoch may have fewer.
        seed: seeds the order, together with the epoch.
        window: number of batches that are sorted together.
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
        """This object: when accelerate shards batches across processes, it calls `set_epoch` on this attribute only."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration uses; it seeds the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.lengths))
        # accelerate drops batches if a smaller one is not the last.
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
