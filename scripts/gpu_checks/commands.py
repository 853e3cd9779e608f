"""Runs loratune's commands, and training programs whose steps are timed, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LORATUNE = (sys.executable, "-m", "loratune")
CLOCKED = (sys.executable, "-m", "gpu_checks.clocked")
TIMED_OUT = 124
Settings = Mapping[str, object]
"""Dotted name of a setting → value."""


@dataclass(frozen=True)
class Finished:
    """A process that has ended."""

    exit_code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def last_words(self) -> str:
        """The end of what it said on stderr, for a report."""
        return " ".join(self.stderr.split())[-300:]


def run(command: Sequence[object], limit: float | None = None, **environment: str) -> Finished:
    """Run a command to its end, with these variables in its environment; the exit code is 124 after `limit` seconds."""
    start, words = time.perf_counter(), [str(word) for word in command]
    settings: dict[str, Any] = {"text": True, "errors": "replace", "env": os.environ | environment}
    try:
        done = subprocess.run(words, capture_output=True, check=False, timeout=limit, **settings)
    except subprocess.TimeoutExpired:
        return Finished(TIMED_OUT, "", f"not done after {limit} s", time.perf_counter() - start)
    return Finished(done.returncode, done.stdout, done.stderr, time.perf_counter() - start)


def loratune(*words: object, limit: float | None = None) -> Finished:
    """Run a command of loratune."""
    return run([*LORATUNE, *words], limit)


def sft_words(settings: Settings, *others: object) -> list[object]:
    """Return the words of `sft` for settings; a switch is a flag without a value."""
    words: list[object] = ["sft", *others]
    for name, value in settings.items():
        words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", value]
    return words


@dataclass(frozen=True)
class Clocked:
    """What a training program did, by the clock in its trainer."""

    seconds: list[float]
    """Of each step but the first ones, which are warm-up."""
    tokens: list[int]
    """Of the same steps, without padding."""
    losses: list[float]
    """Of all steps, in nats per answer token."""
    allocated: int
    """Peak bytes in use on the GPU, or resident without one."""
    reserved: int
    """Peak bytes that torch has taken from the GPU; as `allocated` without one."""
    profile: dict[str, Any]
    """Of one step, where it was asked for."""

    @property
    def tokens_per_second(self) -> float:
        return sum(self.tokens) / sum(self.seconds)

    @property
    def token_seconds(self) -> list[float]:
        """Seconds of each step for one token, sorted: steps of different rows cannot be compared otherwise."""
        return sorted(seconds / tokens for seconds, tokens in zip(self.seconds, self.tokens, strict=True))


def clocked(folder: Path, words: Sequence[object], warm_up: int = 0, profile: int | None = None) -> Clocked:
    """Run a training program with a clock in its trainer.

    Args:
        folder: for its log and figures.
        words: `-m MODULE` or a file, and its arguments.
        warm_up: steps to leave out of the times.
        profile: number of the step to profile.

    Raises:
        RuntimeError: the program has failed, or made no step after its warm-up.
    """
    answer = folder / "clocked.json"
    answer.unlink(missing_ok=True)
    done = run([*CLOCKED, answer, profile or 0, *words])
    if done.exit_code or not answer.is_file():
        raise RuntimeError(f"{words[:3]} ended with {done.exit_code}: {done.last_words}")
    found = json.loads(answer.read_text())
    if warm_up and len(found["seconds"]) <= warm_up:
        raise RuntimeError(f"{words[:3]} made {len(found['seconds'])} steps, of which {warm_up} are warm-up")
    return Clocked(**(found | {name: found[name][warm_up:] for name in ("seconds", "tokens")}))


def clocked_sft(
    folder: Path, settings: Settings, *others: object, warm_up: int = 0, profile: int | None = None
) -> Clocked:
    """Run `loratune sft` with a clock; the run goes to the folder `run`."""
    words = sft_words({"output": folder / "run", **settings}, "--overwrite", *others)
    return clocked(folder, ["-m", "loratune", *words], warm_up, profile)
