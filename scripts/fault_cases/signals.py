"""SIGTERM, SIGINT and SIGHUP at every step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from fault_cases.runner import Runner


def at_step(number: signal.Signals, step: int) -> Callable[[], None]:
    """Return a sabotage that sends a signal to the process during a step."""

    def sabotage() -> None:
        from loratune.training.trainer import AdapterTrainer

        plain = AdapterTrainer.training_step
        sent = False

        def training_step(self: Any, *arguments: Any, **settings: Any) -> Any:
            nonlocal sent
            if self.state.global_step == step and not sent:
                sent = True
                os.kill(os.getpid(), number)
            return plain(self, *arguments, **settings)

        AdapterTrainer.training_step = training_step  # type: ignore[method-assign]

    return sabotage


def at_every_step(number: signal.Signals, runner: Runner) -> Iterator[str | None]:
    """The step has to finish and be saved, with exit code 128 + signal."""
    for step in range(runner.steps):
        name = f"{number.name}{step}"
        code = runner.run(name, sabotage=at_step(number, step))
        if code != 128 + number:
            yield runner.failed(f"step {step}: ended with {code}")
        if (runner.place / name / "adapter").exists():
            yield runner.failed(f"step {step}: an adapter was written")
        yield runner.resumed(name)


CASES = {
    f"{number.name} at every step": partial(at_every_step, number)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
}
