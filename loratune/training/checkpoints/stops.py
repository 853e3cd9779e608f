"""Ctrl-C, and being told to end: at once, or after the step that is under way, with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from loratune import console
from loratune.errors import Interrupted
from loratune.runtime import is_main_process, signals_to


class ValidationStopped(Exception):  # noqa: N818 - nothing is wrong
    """A signal has come while validating."""


class Stops(TrainerCallback):
    """Waits for signals.

    While steps are made, the first lets the step end and be saved; at the end of a finished run it skips the closing
    questions. Any other stops at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """The one that has come and waits for the step's end."""
        self.validation_is_due = False
        """Whether the last step should have been validated and was not."""
        self._told = ""  # when a signal is only noted; nothing where it raises

    @property
    def has_come(self) -> bool:
        """Whether a signal has been noted."""
        return self.signal is not None

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Take the signals over; they raise Interrupted where nothing is worth being finished."""
        with signals_to(self._receive):
            yield

    @contextmanager
    def after_step(self) -> Iterator[None]:
        """While steps are made: a signal is noted, and heeded between two of them."""
        with self._noted("stopping after this step, with a checkpoint; again to stop at once"):
            yield

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """While a finished run is looked at: a signal is noted, and skips what takes long."""
        with self._noted("skipping the closing questions; the run is finished and saved; again to stop at once"):
            yield

    @contextmanager
    def _noted(self, told: str) -> Iterator[None]:
        self._told = told
        try:
            yield
        finally:
            self._told = ""

    def put_off_validation(self) -> None:
        """The last step's validation is left to the resumed run."""
        self.validation_is_due = True

    def raise_if_any(self) -> None:
        """Stop here if a signal has come.

        Raises:
            Interrupted: with it.
        """
        if self.signal is not None:
            raise Interrupted(self.signal)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._told or self.signal is not None:
            self._told = ""
            raise Interrupted(number)
        self.signal = number
        if is_main_process():
            console.interject(self._told)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End here with a checkpoint if a signal has come to any process; a validation is left to the resumed run."""
        if self._has_come(args):
            control.should_save = control.should_training_stop = True
            self.validation_is_due = control.should_evaluate
            control.should_evaluate = False

    def _has_come(self, args: Any) -> bool:
        if args.world_size == 1:
            return self.signal is not None
        numbers = torch.tensor([self.signal or 0], device=args.device)
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
        self.signal = int(numbers) or None
        return self.signal is not None
