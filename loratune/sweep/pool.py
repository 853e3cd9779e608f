"""The processes of a sweep on this machine: started in free places, waited for, and stopped together."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing import connection
from pathlib import Path
from types import FrameType
from typing import Any

from filelock import FileLock

from loratune.errors import Exit
from loratune.recipe.sections import Recipe
from loratune.sweep.messages import Ended, Order
from loratune.sweep.plan import Work
from loratune.sweep.start import context, main

POLL_SECONDS = 1.0
"""How often processes of other commands are looked after."""


@dataclass(frozen=True)
class Place:
    """Where one process at a time may run."""

    number: int
    environment: Mapping[str, str]
    """What differs from this process's."""


@dataclass
class Running:
    """A process that has been started."""

    process: Any
    pipe: Any
    place: Place
    begun: float
    work: Work | None
    claim: FileLock | None

    def ended(self) -> Ended:
        """Return how a process has ended, which may not have come to say it."""
        self.process.join()
        code = int(self.process.exitcode)
        try:
            told = self.pipe.recv() if self.pipe.poll() else None
        except (EOFError, OSError):
            told = None
        if isinstance(told, Ended) and told.code == code:
            return told
        by_signal = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        why = "; the system may have run out of memory" if code == -signal.SIGKILL else ""
        return Ended(code or Exit.BUG, by_signal + why)

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self.begun


def places(workers: int, gpus: Sequence[str]) -> list[Place]:
    """Return a place for each worker, with a GPU of its own where there are any.

    Args:
        workers: how many.
        gpus: what `CUDA_VISIBLE_DEVICES` calls each GPU.
    """
    one_each = [{"CUDA_VISIBLE_DEVICES": gpus[number]} if gpus else {} for number in range(workers)]
    return [Place(number, environment if workers > 1 else {}) for number, environment in enumerate(one_each)]


class Pool:
    """Starts processes in free places, and ends them with this one."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.places, self._context = places, context()
        self._running = list[Running]()
        self.signal: int | None = None
        """The first signal that this process has received."""

    @property
    def is_idle(self) -> bool:
        """Whether no process runs."""
        return not self._running

    def free(self) -> Place | None:
        """Return a place where nothing runs; None if there is none, or after a signal."""
        taken = {one.place.number for one in self._running}
        return None if self.signal else next((one for one in self.places if one.number not in taken), None)

    def start(
        self,
        place: Place,
        recipes: tuple[Recipe, ...],
        share: Fraction | None,
        log: Path,
        work: Work | None = None,
        claim: FileLock | None = None,
    ) -> None:
        """Start a process; see `Order` for the arguments."""
        order = Order(recipes, share, log, {**os.environ, **place.environment}, Path.cwd())
        mine, other = self._context.Pipe(duplex=False)
        process = self._context.Process(target=main, args=(order, other))
        process.start()
        other.close()
        self._running.append(Running(process, mine, place, time.monotonic(), work, claim))
        if self.signal:  # it came while the process started
            self.pass_on(self.signal)

    def wait(self) -> list[Running]:
        """Wait a moment for processes to end, and return those that have."""
        over = connection.wait([one.process.sentinel for one in self._running], POLL_SECONDS)
        ended = [one for one in self._running if one.process.sentinel in over]
        self._running = [one for one in self._running if one not in ended]
        return ended

    def pass_on(self, number: int, _: FrameType | None = None) -> None:
        """Ask every process to stop with a checkpoint, as a signal handler; a second signal stops them at once."""
        self.signal = self.signal or number
        for one in self._running:
            with suppress(ProcessLookupError):
                os.kill(one.process.pid, signal.SIGTERM)
