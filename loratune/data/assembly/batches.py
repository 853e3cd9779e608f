"""Forward passes: rows packed without padding, or padded to the longest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from loratune.data.encoding.encoder import IGNORED
from loratune.multiples import round_up


class PassRows(torch.utils.data.Dataset):
    """A dataset of passes: an item is several sequences.

    Args:
        rows: dataset with columns input_ids and labels, one sequence per row.
    """

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, numbers: list[int]) -> list[dict[str, Any]]:
        """Return the sequences with these numbers, each with its number as `sequence`.

        No numbers give one sequence without labels, so that every process has a forward pass.
        """
        if not numbers:
            return [{"input_ids": [0], "labels": [IGNORED], "sequence": None}]
        found = self.rows[numbers]
        columns = (found["input_ids"], found["labels"], numbers)
        return [
            {"input_ids": ids, "labels": labels, "sequence": number}
            for ids, labels, number in zip(*columns, strict=True)
        ]


def collate_step(passes: list[Any], collate: Callable[[list[Any]], dict[str, Any]]) -> dict[str, Any]:
    """Collate the passes of an optimizer step.

    Args:
        passes: items of PassRows.
        collate: makes a batch of one pass.

    Returns:
        passes: the batches.
        labelled: number of positions that the loss is summed over.
    """
    batches = [collate(rows) for rows in passes]
    return {"passes": batches, "labelled": sum(int((batch["labels"][:, 1:] >= 0).sum()) for batch in batches)}


def round_length(tokens: int) -> int:
    """Round a number of tokens up to one of few batch lengths: 32 per power of two, so at most 3 % longer.

    oneDNN compiles a kernel for each matrix shape and caches it. With arbitrary lengths, every training step would leak
    about 40 MB and spend 5 % of its time compiling.
    """
    unit = max(1, 1 << max(0, tokens.bit_length() - 6))
    return round_up(tokens, unit)


def collate_packed(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Concatenate sequences into one batch row, with document boundaries in flash attention's format.

    The first token of each document has no label, since the preceding document would have to predict it. A filler
    document without labels extends the batch to the next size of `round_length`.

    Returns:
        input_ids, labels and position_ids, int64 [1, tokens]; positions restart at each document.
        cu_seq_lens_q and cu_seq_lens_k, int32 [documents + 1]: cumulative document lengths, starting at 0.
        max_length_q and max_length_k: length of the longest document.
        document_lengths: length of each document, so that nobody has to fetch them from a GPU.
        seq_idx, int32 [1, tokens]: index of each token's document, for layers with a recurrent state. transformers
        raises an error where such a layer cannot keep documents apart; attention layers ignore it.
        about: not a model input; see `_about`.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    tokens = sum(lengths)
    filling = round_length(tokens) - tokens
    if filling:
        lengths.append(filling)
        rows = [*rows, {"input_ids": [0] * filling, "labels": [IGNORED] * filling, "sequence": None}]
    ends = np.cumsum([0, *lengths], dtype=np.int32)
    batch: dict[str, Any] = {
        "input_ids": torch.tensor([list(chain.from_iterable(row["input_ids"] for row in rows))]),
        "labels": torch.tensor([list(chain.from_iterable((IGNORED, *row["labels"][1:]) for row in rows))]),
        "about": _about(rows),
    }
    batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    batch["seq_idx"] = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))[None]
    batch["document_lengths"] = lengths
    for side in ("q", "k"):
        batch[f"cu_seq_lens_{side}"] = torch.from_numpy(ends.copy())
        batch[f"max_length_{side}"] = max(lengths)
    return batch


def collate_padded(rows: Sequence[dict[str, Any]], pad_token_id: int, is_rounded: bool = True) -> dict[str, Any]:
    """Pad sequences on the right to one of the lengths of `round_length`.

    Args:
        rows: the sequences.
        pad_token_id: the token to pad with.
        is_rounded: False to pad only to the longest sequence.

    Returns:
        input_ids, labels and attention_mask (1 for tokens), int64 [sequences, length].
        about: not a model input; see `_about`.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    shape = (len(rows), round_length(longest) if is_rounded else longest)
    batch: dict[str, Any] = {
        "input_ids": torch.full(shape, pad_token_id),
        "labels": torch.full(shape, IGNORED),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "about": _about(rows),
    }
    for place, row in enumerate(rows):
        length = len(row["input_ids"])
        batch["input_ids"][place, :length] = torch.tensor(row["input_ids"])
        batch["labels"][place, :length] = torch.tensor(row["labels"])
        batch["attention_mask"][place, :length] = 1
    return batch


def _about(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the numbers of the sequences in a batch, and their tokens, without padding and filling."""
    own = [row for row in rows if row["sequence"] is not None]
    return {"sequences": [row["sequence"] for row in own], "tokens": sum(len(row["input_ids"]) for row in own)}
