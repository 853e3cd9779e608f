"""Draws the rows of each optimizer step, and divides them into forward passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loratune.data.assembly.packing import spread, spread_within

ALIKE = 0.75
"""A padded pass takes any row of at least this share of its longest row's tokens."""


@dataclass(frozen=True)
class PassLayout:
    """How the rows of a step go through the model: a matter of speed and memory, not of what is learnt."""

    tokens: int
    """Maximum tokens of a pass, padding included; a longer row makes a pass of its own."""
    efficient_tokens: int
    """A pass with fewer tokens is hardly faster; below this, padded passes take rows of any length."""
    is_packed: bool
    """Whether a pass is one packed row, or a padded batch."""
    processes: int = 1
    process: int = 0
    """Number of this process, from 0."""
    is_single: bool = False
    """Whether each row makes a pass of its own, without padding; then `is_packed` does not count."""
    is_even: bool = False
    """Whether all processes make the same number of passes, of which the last ones may be empty."""

    def passes(self, lengths: NDArray[np.int64]) -> list[list[int]]:
        """Divide rows into the passes of this process.

        Args:
            lengths: tokens of each row of the step, over all processes.

        Returns:
            The rows of each pass, by index into `lengths`. At least one pass, which is empty if the step has fewer rows
            than there are processes.
        """
        # Shares of nearly equal tokens: in the reduction of the gradients, all wait for the process that has most.
        shares = spread(lengths, self.processes)
        own = self._passes_of(shares[self.process], lengths)
        if self.is_even:
            most = max(len(self._passes_of(share, lengths)) for share in shares)
            own += [[] for _ in range(most - len(own))]
        return own

    def _passes_of(self, share: Sequence[int], lengths: NDArray[np.int64]) -> list[list[int]]:
        """Divide a process's rows into passes."""
        capacity, rows = max(self.tokens, int(lengths.max(initial=1))), np.array(share, dtype=np.int64)
        if self.is_single:
            return [[row] for row in rows.tolist()] or [[]]
        if self.is_packed:
            return [rows[members].tolist() for members in spread_within(lengths[rows], capacity)] or [[]]
        return self._padded(lengths, rows.tolist(), capacity)

    def _padded(self, lengths: NDArray[np.int64], longest_first: list[int], capacity: int) -> list[list[int]]:
        passes: list[list[int]] = []
        for row in longest_first:
            if passes:
                longest, rows = int(lengths[passes[-1][0]]), len(passes[-1])
                joins = longest * rows < self.efficient_tokens or lengths[row] >= ALIKE * longest
                if joins and longest * (rows + 1) <= capacity:
                    passes[-1].append(row)
                    continue
            passes.append([row])
        return passes or [[]]


def order_of_rows(rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order in which an epoch trains on rows, by their indices."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


class StepSampler:
    """A batch sampler whose batches are optimizer steps, each a list of passes.

    Each epoch permutes the rows anew and cuts them into steps, so that a step is a random sample and every row is used
    once per epoch. The same seed gives the same steps with any layout and any number of processes.

    Args:
        lengths: tokens of each row.
        batch_size: rows of a step over all processes; the last step of an epoch may have fewer.
        seed: seeds the order, together with the epoch.
        layout: divides a step into passes.
    """

    drop_last = False

    def __init__(
        self, lengths: Sequence[int] | NDArray[np.integer], batch_size: int, seed: int, layout: PassLayout
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.batch_size = batch_size
        self.seed = seed
        self.layout = layout
        self.epoch = 0

    @property
    def batch_sampler(self) -> StepSampler:
        """This object: transformers calls `set_epoch` on the sampler that another one wraps."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration uses; it seeds the order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[list[int]]]:
        order = order_of_rows(len(self.lengths), self.seed, self.epoch)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            yield [rows[members].tolist() for members in self.layout.passes(self.lengths[rows])]
