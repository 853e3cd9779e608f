"""How long a run takes to get going, by stage."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from loratune import STARTED


class StartUp(TrainerCallback):
    """Seconds from the start of the program to the end of the first step.

    Stages, in their order: imports, data (found, checked, encoded), model (read, adapter attached), trainer (set up,
    the run folder begun), validation (the one before training), first step.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = STARTED

    def stage_done(self, name: str) -> None:
        """Note what has passed since the stage before."""
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 3)
        self._last = now

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The trainer stands."""
        self.stage_done("trainer")

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A validation is done; only the first one is of interest."""
        if state.global_step == 0:
            self.stage_done("validation")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step is done."""
        if "first step" not in self.seconds:
            self.stage_done("first step")
