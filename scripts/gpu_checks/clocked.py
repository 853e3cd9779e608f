"""Runs a training program with a clock in each trainer that it makes, and writes what the clock has seen.

python -m gpu_checks.clocked FIGURES.json PROFILED_STEP|0 (-m MODULE | FILE) [ARGUMENT ...]
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

if sys.argv[3:5] == ["-m", "loratune"]:
    import loratune.cli.app  # noqa: F401  its settings of the environment have to come before torch

import torch
import transformers.trainer
from transformers import TrainerCallback

from gpu_checks import machine
from gpu_checks.profiles import StepProfile

SEEN: list[StepClock] = []


class StepClock(TrainerCallback):
    """Takes the time at each step's end, by events of the GPU where there is one."""

    profiled_step = 0
    """Number of the step to profile, from 1."""

    def __init__(self) -> None:
        self.marks: list[Any] = []
        self.tokens: list[int] = [0]
        self.losses: list[float] = []
        self.profile = StepProfile()
        SEEN.append(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.marks.append(mark())

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.profiled_step:
            self.profile.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.profile.is_running:
            self.profile.stop()
        self.marks.append(mark())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.tokens.append(int(logs.get("num_tokens", 0)))

    def figures(self) -> dict[str, Any]:
        machine.synchronize()
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return {
            "seconds": [between(before, after) for before, after in pairs],
            "tokens": [after - before for before, after in zip(self.tokens, self.tokens[1:], strict=False)],
            "losses": self.losses,
            "allocated": machine.memory_peak(),
            "reserved": torch.cuda.max_memory_reserved() if torch.cuda.is_available() else machine.memory_peak(),
            "profile": self.profile.figures,
        }


def mark() -> Any:
    """Return this moment: an event in the GPU's queue, or seconds."""
    if not torch.cuda.is_available():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(before: Any, after: Any) -> float:
    """Return the seconds between two moments."""
    return after - before if isinstance(before, float) else before.elapsed_time(after) / 1000


def main() -> None:
    answer, words = Path(sys.argv[1]), sys.argv[3:]
    StepClock.profiled_step = int(sys.argv[2])
    transformers.trainer.DEFAULT_CALLBACKS.append(StepClock)
    runner, target = (runpy.run_module, words.pop(1)) if words[0] == "-m" else (runpy.run_path, words[0])
    sys.argv = [target, *words[1:]]
    try:
        runner(target, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    answer.write_text(json.dumps(SEEN[0].figures() if SEEN else no_training()))


def no_training() -> dict[str, Any]:
    """Return the memory of a program that makes no trainer."""
    reserved = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else machine.memory_peak()
    empty: dict[str, Any] = {"seconds": [], "tokens": [], "losses": [], "profile": {}}
    return empty | {"allocated": machine.memory_peak(), "reserved": reserved}


if __name__ == "__main__":
    main()
