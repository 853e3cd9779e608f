"""Training and validation batches: packed, or padded and grouped by length."""

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
    """How sequences are combined into batches."""

    settings: TrainingSettings
    validation_batch_size: int | None
    """Sequences per validation batch; None for the same number as in training."""
    seed: int
    pad_token_id: int

    @property
    def collate(self) -> Callable[[list[Any]], dict[str, Any]]:
        """The collate function of a batch."""
        return collate_packed if self.settings.packing else partial(collate_padded, pad_token_id=self.pad_token_id)

    def rows(self, split: Split, is_validation: bool = False) -> Dataset[Any]:
        """Return the dataset of packed rows, or of single sequences."""
        sequences, settings = as_dataset(split), self.settings
        if not settings.packing:
            return ReadRows(NumberedRows(sequences))
        if is_validation and self.validation_batch_size:
            settings = settings.model_copy(update={"batch_size": self.validation_batch_size, "tokens_per_batch": None})
        return ReadRows(PackedRows(sequences, packed_batches(settings, split.lengths, self.seed)))


class ReadRows(Dataset[Any]):
    """Reports read errors of the memory-mapped rows during training."""

    def __init__(self, rows: NumberedRows | PackedRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Return a row unchanged.

        Raises:
            LoratuneError: the encoded rows cannot be read.
        """
        try:
            return self.rows[row]
        except (OSError, ValueError) as error:  # pyarrow's errors are one of them
            raise LoratuneError(
                f"the encoded rows in {rows_folder()} can no longer be read: {error}. Checkpoints made so far are "
                "intact; check the disk, then continue with --resume",
                Exit.DATA,
            ) from error
