"""The batches of training and validation: packed rows, or padded ones of like length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.data import Dataset

from loratune.data.assembly.batches import NumberedRows, PackedRows, collate_packed, collate_padded
from loratune.data.assembly.dataset import as_dataset
from loratune.data.assembly.split import Split
from loratune.data.encoding.cache import rows_folder
from loratune.errors import Exit, LoratuneError
from loratune.recipe.sections import TrainingSettings
from loratune.training.steps import packed_batches


@dataclass(frozen=True)
class Batching:
    """How sequences come together in batches."""

    settings: TrainingSettings
    validation_batch_size: int | None
    """Rows of a batch in validation, if not as many as in training."""
    seed: int
    pad_token_id: int

    @property
    def collate(self) -> Callable[[list[Any]], dict[str, Any]]:
        """What makes tensors of the rows of a batch."""
        return collate_packed if self.settings.packing else partial(collate_padded, pad_token_id=self.pad_token_id)

    def rows(self, split: Split, is_validation: bool = False) -> Dataset[Any]:
        """What batches are drawn from: packed rows, or sequences."""
        sequences, settings = as_dataset(split), self.settings
        if not settings.packing:
            return ReadRows(NumberedRows(sequences))
        if is_validation and self.validation_batch_size:
            settings = settings.model_copy(update={"batch_size": self.validation_batch_size, "tokens_per_batch": None})
        return ReadRows(PackedRows(sequences, packed_batches(settings, split.lengths, self.seed)))


class ReadRows(Dataset[Any]):
    """Rows whose file may have become unreadable while they are trained on."""

    def __init__(self, rows: NumberedRows | PackedRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """A row, as it is.

        Raises:
            LoratuneError: the encoded rows cannot be read.
        """
        try:
            return self.rows[row]
        except (OSError, ValueError) as error:  # pyarrow's errors are one of them
            raise LoratuneError(
                f"the encoded rows in {rows_folder()} can no longer be read: {error}. Checkpoints made so far are "
                "whole; see that the disk is well, then go on with --resume",
                Exit.DATA,
            ) from error
