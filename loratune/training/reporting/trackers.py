"""Starts and monitors experiment trackers, each in its own process, so that none can stop or delay training."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from loratune import console
from loratune.extras import needs
from loratune.recipe.sections import TrackingSettings
from loratune.runs.folder import METRICS, RECIPE, TRACKER_LOGS
from loratune.training.checkpoints.signals import StopSignals

END_SECONDS, STOPPED_END_SECONDS = 30, 5
"""Time for a tracker to finish after training has ended, or was stopped by a signal."""
CODE = """\
import json, sys
kind, sys.path[:] = sys.argv[1], json.loads(sys.argv[2])
from loratune.training.reporting.tracker_process import track
track(kind, *sys.argv[3:])
"""
EXTRAS = {"tensorboard": "tensorboard"}
"""Tracker → loratune's extra with its package, if there is one."""


class Trackers(TrainerCallback):
    """Starts the trackers with the first step, warns once about each that fails, and ends them.

    Args:
        settings: the trackers and the run's name.
        run: run folder.
        stops: knows whether a signal ended training.
    """

    def __init__(self, settings: TrackingSettings, run: Path, stops: StopSignals) -> None:
        wanted = [name for name in dict.fromkeys(settings.report_to) if name != "none"]
        self._names = [name for name in wanted if _is_installed(name)]
        self.warnings = [
            needs(f"tracking.report_to {name}", name, EXTRAS.get(name, ""))
            for name in wanted
            if name not in self._names
        ]
        """Warnings about missing packages."""
        self._title = settings.run_name or run.absolute().name
        self._run, self._logs, self._stops = run, run / TRACKER_LOGS, stops
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start a process for each tracker."""
        for name in self._names if state.is_world_process_zero else ():
            try:
                self._processes[name] = self._start(name)
            except OSError as error:
                self._tell(name, str(error))

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report trackers that have ended."""
        for name, process in list(self._processes.items()):
            if process.poll() is not None:
                _close_input(self._processes.pop(name))
                self._tell(name, self._last_words(name, process.returncode))

    def close(self) -> None:
        """Let the trackers finish, within a time limit; also called after an error."""
        seconds = STOPPED_END_SECONDS if self._stops.signal else END_SECONDS
        try:
            for process in self._processes.values():
                _close_input(process)
            end = time.monotonic() + seconds
            for name, process in self._processes.items():
                self._await(name, process, end)
        finally:
            for process in self._processes.values():
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            self._processes.clear()

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        self._logs.mkdir(exist_ok=True)
        places = [self._run / RECIPE, self._run / METRICS, self._logs]
        arguments = [name, json.dumps(sys.path), self._title, *map(str, places), str(END_SECONDS)]
        with self._log(name).open("wb") as log:
            # A new session shields it from Ctrl-C in the terminal, which is meant for the training.
            return subprocess.Popen(
                [sys.executable, "-c", CODE, *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _await(self, name: str, process: subprocess.Popen[bytes], end: float) -> None:
        try:
            code = process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._tell(name, "it did not finish in time and was stopped")
            return
        if code:
            self._tell(name, self._last_words(name, code))
        elif self._log(name).stat().st_size == 0:
            self._log(name).unlink()

    def _tell(self, name: str, reason: str) -> None:
        console.warn(
            f"tracking.report_to {name} has failed: {reason}. Training continues without it; {self._run / METRICS} "
            f"has all metrics, {self._log(name)} the output of {name}"
        )

    def _last_words(self, name: str, code: int) -> str:
        lines = self._log(name).read_text(encoding="utf-8", errors="replace").split("\n")
        output = [line.strip() for line in lines if line.strip()]
        return output[-1][:300] if output else f"it ended with {code}"

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"


def _close_input(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()


def _is_installed(name: str) -> bool:
    """Return whether a package is installed; a mere folder of that name, which some trackers create, does not count."""
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None
