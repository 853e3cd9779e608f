"""The data loaders of training and validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset

from loratune.data.assembly.batches import PassRows, collate_packed, collate_padded, collate_step
from loratune.data.assembly.dataset import as_dataset
from loratune.data.assembly.split import Split
from loratune.data.assembly.steps import PassLayout, StepSampler
from loratune.data.encoding.cache import rows_folder
from loratune.errors import Exit, LoratuneError


@dataclass(frozen=True)
class Batching:
    """How sequences are combined into optimizer steps and passes."""

    batch_size: int
    """Sequences per optimizer step, over all processes."""
    layout: PassLayout
    seed: int
    pad_token_id: int

    def training_steps(self, split: Split, device: torch.device) -> DataLoader[Any]:
        """Return this process's part of each optimizer step of an epoch, on the device; see `collate_step`."""
        return self._loader(split, StepSampler(split.lengths, self.batch_size, self.seed, self.layout), device)

    def validation_passes(self, split: Split, device: torch.device) -> DataLoader[Any]:
        """Return this process's passes over all sequences, on the device, each as a step of its own."""
        return self._loader(split, [[members] for members in self.layout.passes(split.lengths)], device)

    @property
    def collate(self) -> Callable[[list[Any]], dict[str, Any]]:
        """The collate function of a pass."""
        if self.layout.is_packed and not self.layout.is_single:
            return collate_packed
        return partial(collate_padded, pad_token_id=self.pad_token_id, is_rounded=not self.layout.is_single)

    def _loader(self, split: Split, sampler: Any, device: torch.device) -> DataLoader[Any]:
        loader = DataLoader(
            ReadRows(PassRows(as_dataset(split))),
            batch_sampler=sampler,
            collate_fn=partial(collate_step, collate=self.collate),
            pin_memory=device.type == "cuda",
        )
        # The sampler has divided the steps among the processes already.
        return prepare_data_loader(
            loader, device, num_processes=1, process_index=0, put_on_device=True, non_blocking=device.type == "cuda"
        )


class ReadRows(Dataset[Any]):
    """Reports read errors of the memory-mapped rows during training."""

    def __init__(self, rows: PassRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, numbers: list[int]) -> list[dict[str, Any]]:
        """Return the sequences of a pass unchanged.

        Raises:
            LoratuneError: the encoded rows cannot be read.
        """
        try:
            return self.rows[numbers]
        except (OSError, ValueError) as error:  # pyarrow's errors are one of them
            raise LoratuneError(
                f"the encoded rows in {rows_folder()} can no longer be read: {error}. Checkpoints made so far are "
                "intact; check the disk, then continue with --resume",
                Exit.DATA,
            ) from error
