"""The batches of training and validation: packed rows, or padded ones of like length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.data import Dataset

from loratune.data.batches import PackedRows, collate_packed, collate_padded
from loratune.data.dataset import as_dataset
from loratune.data.split import Split
from loratune.recipe.sections import TrainingSettings
from loratune.training.steps import packed_batches


@dataclass(frozen=True)
class Batching:
    """How sequences come together in batches."""

    settings: TrainingSettings
    seed: int
    pad_token_id: int

    @property
    def collate(self) -> Callable[[list[Any]], dict[str, Any]]:
        """What makes tensors of the rows of a batch."""
        return collate_packed if self.settings.packing else partial(collate_padded, pad_token_id=self.pad_token_id)

    def rows(self, split: Split) -> Dataset[Any]:
        """What batches are drawn from: packed rows, or sequences."""
        sequences = as_dataset(split)
        if not self.settings.packing:
            return sequences
        return PackedRows(sequences, packed_batches(self.settings, split.lengths, self.seed))
