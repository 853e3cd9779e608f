"""Gives an adapter a start by the first training rows (EVA)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from loratune.data.assembly.dataset import as_dataset
from loratune.data.assembly.split import Split
from loratune.data.assembly.steps import order_of_rows
from loratune.model.adapter.input_start import start_from_inputs
from loratune.protocols import AdaptedModel
from loratune.recipe.method_sections import LoraSettings

TOKENS, TOKENS_OF_A_RANK = 1024, 4
"""Answer tokens that are read: this many, or this many for each rank of the widest layer."""
MOST_TOKENS = 16_384
"""Tokens of the forward pass, padding included; a single longer row is read whole."""


def start_from_rows(model: AdaptedModel, settings: LoraSettings, split: Split, seed: int) -> None:
    """Set the matrices A of a fresh adapter by the rows of the first steps.

    Args:
        model: the base with the adapter.
        settings: the recipe's lora section.
        split: the training rows.
        seed: the recipe's, which orders the rows.

    Raises:
        LoratuneError: see `start_from_inputs`.
    """
    rows = list(_first(split, seed, max(TOKENS, TOKENS_OF_A_RANK * settings.saved_rank)))
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask, labelled = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
    for place, row in enumerate(rows):
        length = len(row["input_ids"])
        ids[place, :length] = torch.tensor(row["input_ids"])
        mask[place, :length] = True
        labelled[place, :length] = torch.tensor(row["labels"]) >= 0
    start_from_inputs(model, *(one.to(model.device) for one in (ids, mask, labelled)))


def _first(split: Split, seed: int, tokens: int) -> Iterator[dict[str, Any]]:
    """Yield the first rows in the order of training until they have enough answer tokens, or fill the pass."""
    rows, longest, labelled = as_dataset(split), 0, 0
    for count, number in enumerate(order_of_rows(len(split), seed, epoch=0).tolist(), start=1):
        longest = max(longest, int(split.lengths[number]))
        if labelled >= tokens or (count > 1 and count * longest > MOST_TOKENS):
            return
        row = rows[number]
        labelled += sum(label >= 0 for label in row["labels"])
        yield row
