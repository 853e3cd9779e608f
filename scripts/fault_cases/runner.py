"""Runs `loratune sft` in forked processes, and compares the results with those of an uninterrupted run."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

Sabotage = Callable[[], None]
"""Called in the forked process before training."""
ADAPTER = "adapter/adapter_model.safetensors"


class Runner:
    """The command, the working folder, and the result of the uninterrupted run."""

    def __init__(self, place: Path, arguments: argparse.Namespace) -> None:
        self.place, self.steps, self.kills = place, arguments.steps, arguments.kills
        self.random = random.Random(0)
        self.differing = self.failures = 0
        rows = [{"instruction": f"How much is {n}?", "output": f"It is {n}. " * (1 + n % 5)} for n in range(24)]
        self.rows = place / "rows.json"
        self.rows.write_text(json.dumps(rows))
        settings = {
            "model.base": arguments.model, "model.quantization": arguments.quantization, "data.train": self.rows,
            "data.validation": 0.2, "data.levels": "repetitive=ignore", "lora.dropout": 0.1, "training.batch_size": 4,
            "training.learning_rate": 1e-3, "training.steps": self.steps,
            "evaluation.every_steps": 2, "checkpoints.every_steps": 2,
        }  # fmt: skip
        self.flags = [f"--{name}={value}" for name, value in settings.items()] + arguments.flag
        import loratune.training.reporting.report
        import loratune.training.run  # noqa: F401 - so that no forked process has to

        self.whole = self.run("whole")
        if self.whole != 0:
            sys.exit((place / "whole.log").read_text())
        self.seconds = self.duration("whole")
        self.expected = self.digest("whole")

    def run(self, name: str, *flags: str, sabotage: Sabotage | None = None, kill_after: float | None = None) -> int:
        """Train in `place / name`; return the exit code, or the negative number of the signal."""
        child = self.start(name, *flags, sabotage=sabotage)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        return self.ended(child)

    def start(self, name: str, *flags: str, sabotage: Sabotage | None = None, **environment: object) -> int:
        """Start a training in `place / name`; return the process ID."""
        child = os.fork()
        if not child:
            os.environ.update({variable: str(value) for variable, value in environment.items()})
            self._train(name, flags, sabotage)
        return child

    def ended(self, child: int) -> int:
        """Wait for a process; return its exit code, or the negative number of the signal."""
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _train(self, name: str, flags: tuple[str, ...], sabotage: Sabotage | None) -> None:
        """Train and exit; never returns."""
        from loratune.cli.app import main

        code = 1
        try:
            log = os.open(self.place / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if sabotage:
                sabotage()
            sys.argv = ["loratune", "sft", *self.flags, *flags, f"--output={self.place / name}"]
            main()
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def resumed(self, name: str, *flags: str) -> str | None:
        """Resume a run and compare its adapter; return what is wrong, or None."""
        return self.compared(name, self.run(name, "--resume=auto", *flags), self.expected)

    def compared(self, name: str, code: int, expected: str) -> str | None:
        """Compare the adapter of a resumed run with a hash; return what is wrong, or None."""
        if code != 0:
            self.failures += 1
            return f"resuming ended with {code}: {self.last_line(name)}"
        if self.digest(name) != expected:
            self.differing += 1
            return "the adapter differs"
        left = [path.name for path in (self.place / name).rglob(".loratune-*")]
        return f"left behind: {left}" if left else None

    def failed(self, text: str) -> str:
        """Count and describe a run with an unexpected end."""
        self.failures += 1
        return text

    def report(self, name: str, case: Callable[[Runner], Iterator[str | None]]) -> None:
        """Run a case and print its line."""
        results = list(case(self))
        wrong = [result for result in results if result]
        told = "ok" if not wrong else f"{len(wrong)} wrong: " + "; ".join(dict.fromkeys(wrong))
        print(f"{name:<44} {len(results):>4}  {told}", flush=True)
        for folder in self.place.iterdir():
            if folder.is_dir() and folder.name != "whole":
                shutil.rmtree(folder)

    def digest(self, name: str) -> str:
        """Return the hash of the final adapter."""
        return hashlib.sha256((self.place / name / ADAPTER).read_bytes()).hexdigest()

    def duration(self, name: str) -> float:
        """Return the seconds of a run, from the start of the program."""
        report = json.loads((self.place / name / "report.json").read_text())
        return float(report["seconds"] + report["start_up_seconds"]["data"] + report["start_up_seconds"]["model"])

    def last_line(self, name: str) -> str:
        """Return the last line of a run's output."""
        lines = (self.place / f"{name}.log").read_text().strip().splitlines()
        return lines[-1] if lines else ""

    def copy(self, source: str, name: str) -> Path:
        shutil.copytree(self.place / source, self.place / name)
        return self.place / name
