"""Times the start of a run by stage."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from loratune import STARTED


class StartUp(TrainerCallback):
    """Seconds from the start of the program to the end of the first step.

    Stages in order: imports, data (load, check, encode), model (load, attach adapter), trainer (set up, create the run
    folder), validation (the one before training), first step.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = STARTED

    def stage_done(self, name: str) -> None:
        """Record the time since the previous stage."""
        now = time.perf_counter()
        self.seconds[name] = round(now - self._last, 3)
        self._last = now

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the stage of setting up the trainer."""
        self.stage_done("trainer")

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the stage of the first validation."""
        if state.global_step == 0:
            self.stage_done("validation")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if "first step" not in self.seconds:
            self.stage_done("first step")
