"""Handles SIGINT and SIGTERM: stops at once, or after the current step with a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from loratune import console
from loratune.errors import Interrupted, Paused
from loratune.runtime import is_main_process, signals_to


class ValidationStopped(Exception):  # noqa: N818 - not an error
    """Raised when a signal arrives during validation."""


class StopSignals(TrainerCallback):
    """Handles signals.

    During training, the first signal finishes and saves the current step; after a finished run, it skips the sample
    generations. All others stop at once. A run can be told to stop itself after a step, which it validates before.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """The received signal, until the step ends."""
        self.last_step: int | None = None
        """The step after which the run stops itself, to go on later; None for the last one of its schedule."""
        self.validation_is_due = False
        """Whether the validation of the last step was interrupted."""
        self._has_paused = False
        self._is_repeated = False
        """Whether the next signal would be this process's second one."""
        self._advance: Callable[[], None] = lambda: None
        self._told = ""  # message when a signal is deferred; empty if it raises at once

    @property
    def has_come(self) -> bool:
        """Whether a signal was received."""
        return self.signal is not None

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Install the signal handlers; by default a signal raises Interrupted."""
        with signals_to(self._receive):
            yield

    @contextmanager
    def after_step(self, advance: Callable[[], None]) -> Iterator[None]:
        """During training: defer a signal to the end of the step.

        Args:
            advance: called before the processes of a run wait for each other.
        """
        self._advance = advance
        with self._noted("stopping after this step, with a checkpoint; repeat to stop at once"):
            yield

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """After a finished run: a signal skips the rest of the closing work."""
        with self._noted("skipping the sample generations; the run is finished and saved; repeat to stop at once"):
            yield

    @contextmanager
    def _noted(self, told: str) -> Iterator[None]:
        self._told = told
        try:
            yield
        finally:
            self._told = ""

    def put_off_validation(self) -> None:
        """Leave the last step's validation to the resumed run."""
        self.validation_is_due = True

    def raise_if_any(self) -> None:
        """Stop here if a signal was received, or after the step at which the run stops itself.

        Raises:
            Interrupted: with the signal.
            Paused: without one.
        """
        if self.signal is not None:
            raise Interrupted(self.signal)
        if self._has_paused:
            raise Paused(signal.SIGTERM)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._told or self._is_repeated:
            self._told = ""
            raise Interrupted(number)
        self._is_repeated = True
        if self.signal is not None:
            return  # another process got it earlier, and this one has heard of it at the end of the step
        self.signal = number
        if is_main_process():
            console.interject(self._told)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop with a checkpoint if any process received a signal; a due validation is left to the resumed run."""
        if state.global_step == self.last_step:
            control.should_save = control.should_evaluate = True
        if self._has_come(args):
            control.should_save = control.should_training_stop = True
            self.validation_is_due = control.should_evaluate
            control.should_evaluate = False

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop after the step that is the last one for now; not if it is the last for another reason."""
        # Only here, after the validation: what it stops by itself counts as stopped early.
        if state.global_step == self.last_step and not control.should_training_stop:
            control.should_training_stop = True
            self.pause()

    def is_reached(self, step: int) -> bool:
        """Return whether a step is the last one for now, or a later one."""
        return self.last_step is not None and step >= self.last_step

    def pause(self) -> None:
        """Stop the run where it stands, as after its last step for now."""
        self._has_paused = True

    def _has_come(self, args: Any) -> bool:
        if args.world_size == 1:
            return self.signal is not None
        self._advance()  # a process that still is in its optimizer step has not come here
        numbers = torch.tensor([self.signal or 0], device=args.device)
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
        if agreed := int(numbers):  # else a signal may have come meanwhile, which counts at the end of the next step
            self.signal = agreed
        return bool(agreed)
