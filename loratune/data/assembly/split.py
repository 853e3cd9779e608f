"""Selects the training or validation sequences of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loratune.data.assembly.pool import Pool, place_of


@dataclass
class Split:
    """The sequences of the training or the validation set."""

    pool: Pool
    max_length: int

    @cached_property
    def parts(self) -> list[NDArray[np.int64]]:
        """For each source of the pool, the indices of the usable sequences in its file."""
        return [self._fitting(number) for number in range(len(self.pool.sources))]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence."""
        return self._of_sequences("tokens")

    @cached_property
    def trained_tokens(self) -> int:
        """Number of labelled positions."""
        return int(self._of_sequences("trained").sum())

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def longest(self) -> int:
        return int(self.lengths.max(initial=0))

    def __len__(self) -> int:
        return len(self.lengths)

    def questions(self, limit: int) -> list[list[dict[str, Any]]]:
        """Return up to `limit` conversations, evenly spaced over the rows."""
        count = min(limit, len(self.pool))
        return [self.pool.messages(index) for index in np.linspace(0, len(self.pool) - 1, count, dtype=np.int64)]

    def place(self, sequence: int) -> str:
        """Return the file and line of a sequence's row and the beginning of its question, for messages."""
        for loaded, part in zip(self.pool.sources, self.parts, strict=True):
            if sequence < len(part):
                return place_of(loaded, int(np.searchsorted(loaded.rows.starts, part[sequence], side="right")) - 1)
            sequence -= len(part)
        raise IndexError("no such sequence")

    def _fitting(self, number: int) -> NDArray[np.int64]:
        rows = self.pool.sources[number].rows
        sequences = self.pool.sequences(number)
        fits = (rows.tokens[sequences] <= self.max_length) & (rows.trained[sequences] > 0)
        fitting: NDArray[np.int64] = sequences[fits]
        return fitting

    def _of_sequences(self, name: str) -> NDArray[np.int64]:
        arrays = [getattr(loaded.rows, name)[part] for loaded, part in zip(self.pool.sources, self.parts, strict=True)]
        return np.concatenate(arrays).astype(np.int64)
