"""Checks that rows of a written matrix equal PEFT's merge of the base, rounded once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from loratune.model.weights.rounding_steps import steps_off

if TYPE_CHECKING:
    from loratune.model.adapter.peft_merge import Change

FORWARD_ERROR = 0.01
"""Maximum error of a merged layer against PEFT's unmerged layer, relative to the adapter's effect."""
PROBES = 4
"""Number of random inputs per layer."""


class WrongRow(NamedTuple):
    """A row that is not the rounded one."""

    place: int
    """Among those that were compared."""
    steps: float
    """How many rounding steps it is off."""


class RowCheck:
    """Compares rows, and records the largest errors over all tensors."""

    def __init__(self) -> None:
        self.largest_steps = 0.0
        self.largest_forward_error = 0.0
        self._lost = self._updates = 0.0

    @property
    def lost_to_rounding(self) -> float:
        """Norm of the rounding errors relative to the updates', in Frobenius norms of the sampled rows."""
        return math.sqrt(self._lost / self._updates) if self._updates else 0.0

    def first_wrong_row(self, written: torch.Tensor, merged: torch.Tensor, tolerance: torch.Tensor) -> WrongRow | None:
        """A row that is not the rounded one; None if all are.

        Args:
            written: (n, columns) or (n,), in the dtype of the file.
            merged: expected values before rounding, in float32 or float64.
            tolerance: maximum float32 error of each row (n,).
        """
        tolerance = tolerance.reshape(-1, *[1] * (written.ndim - 1))
        if written.dtype == torch.float32:  # nearly every value differs in its last bit
            differs = ~((written - merged).abs() <= tolerance)
        else:
            differs = written != merged.to(written.dtype)
        if not differs.any():
            return None
        places = differs.nonzero(as_tuple=True)
        beyond = steps_off(written[places], merged[places], tolerance.expand(written.shape)[places])
        wrong = (~(beyond <= 0.5)).nonzero()  # the negation also catches NaN
        if not len(wrong):
            return None
        return WrongRow(int(places[0][wrong[0, 0]]), float(beyond[wrong[0, 0]]))

    def sample(
        self,
        change: Change,
        original: torch.Tensor,
        written: torch.Tensor,
        before: torch.Tensor,
        numbers: torch.Tensor,
    ) -> str | None:
        """Compare rows with a float64 merge, and with PEFT's unmerged layer; return a problem or None.

        Args:
            change: PEFT's change to the tensor.
            original: the rows before the change.
            written: the written rows.
            before: the whole tensor of the base.
            numbers: row numbers.
        """
        original = original.double()
        merged = change.rows(original, numbers)
        tolerance = change.tolerance(merged, numbers).reshape(-1, *[1] * (merged.ndim - 1))
        steps = float(steps_off(written, merged, tolerance).max())
        if not steps <= 0.5:
            return f"a row that is {steps:.3g} rounding steps away from PEFT's in float64"
        self.largest_steps = max(self.largest_steps, steps)
        if before.shape[1:] == written.shape[1:] and int(numbers.max()) < len(before):
            self._lost += float((written.double() - merged).square().sum())
            self._updates += float((merged - before[numbers].double()).square().sum())
        return self._run(change, original, merged, numbers)

    def _run(self, change: Change, original: torch.Tensor, merged: torch.Tensor, numbers: torch.Tensor) -> str | None:
        """Compare the output of merged rows with PEFT's unmerged layer, relative to the adapter's effect."""
        if change.lora is None or change.is_bias or change.tokens:
            return None
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(PROBES, merged.shape[1], generator=generator, dtype=merged.dtype)
        expected = change.lora.run(original, numbers, inputs)
        if expected is None:
            return None
        effect = float((expected - inputs @ original.T).norm())
        error = float((expected - inputs @ merged.T).norm())
        noise = 1e-12 * float(expected.norm())
        if not error <= FORWARD_ERROR * effect + noise:
            return (
                f"another matrix than PEFT's layer computes with: {error:.3g} off where the adapter does {effect:.3g}"
            )
        if effect > noise:
            self.largest_forward_error = max(self.largest_forward_error, error / effect)
        return None
