"""Ends a run of several processes in which one has stopped working, and says which."""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

from torch.distributed import TCPStore

from loratune import console
from loratune.errors import Exit
from loratune.runtime import process_count, process_number

PULSE_SECONDS = 1.0
"""Between two reports of a process to the store of the process group."""
READING_SECONDS = 10
"""How long the store may take to be read twice."""
PREFIX = "loratune/watch"


class _Sign(NamedTuple):
    """What a process has reported."""

    progress: int
    """Number of things that it has done, the same in all processes at the same place of a step."""
    pulse: int
    """Number of its reports."""
    host: str


class Watch:
    """Ends this process where the run makes no more progress.

    A process that hangs, or a connection that was lost without a word, leaves the others waiting in a collective
    operation, from which no exception wakes them. A thread of each process reports its progress to the store of the
    process group; another one reads what all have reported when there was no progress for too long.

    Args:
        seconds: how long a process may take from one call of `advance` or `keep_alive` to the next.
        before_end: called before the process ends with exit code `Exit.PEER`.
    """

    def __init__(self, seconds: float, before_end: Callable[[], None]) -> None:
        self._seconds, self._before_end = seconds, before_end
        self._progress, self._newest = 0, time.monotonic()
        self._is_over = threading.Event()

    def advance(self) -> None:
        """Note progress, before waiting for the others: all processes call this at the same places of a step."""
        self._progress += 1
        self.keep_alive()

    def keep_alive(self) -> None:
        """Note that this process works, at a place that others may not have."""
        self._newest = time.monotonic()

    def __enter__(self) -> Watch:
        if process_count() > 1:
            self.keep_alive()
            in_background(self._report)
            in_background(self._watch)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()

    def _report(self) -> None:
        """Report this process's progress every second, until the store is gone with the process that holds it."""
        host = socket.gethostname()
        with suppress(RuntimeError):
            store = connected()
            for pulse in itertools.count(1):
                store.set(f"{PREFIX}/{process_number()}", f"{self._progress} {pulse} {host}")
                if self._is_over.wait(PULSE_SECONDS):
                    return

    def _watch(self) -> None:
        while not self._is_over.wait(PULSE_SECONDS):
            if time.monotonic() - self._newest > self._seconds:
                self._end(self._reason())

    def _reason(self) -> str:
        """Return why there is no progress."""
        found = list[str]()

        # A machine that no longer answers may be the store's, and reading would then wait for ever.
        def read() -> None:
            with suppress(RuntimeError):
                found.append(self._diagnosis())

        reading = in_background(read)
        reading.join(READING_SECONDS)
        return found[0] if found else "the machine of the first process, to which all are connected, no longer answers"

    def _diagnosis(self) -> str:
        """Compare the processes' reports at two moments."""
        store = connected()
        before = _signs(store)
        time.sleep(3 * PULSE_SECONDS)
        now = _signs(store)
        silent = [number for number, sign in now.items() if sign == before[number]]
        least = min(sign.progress for sign in now.values())
        behind = [number for number, sign in now.items() if sign.progress == least]
        waited = f"for {self._seconds:g} seconds"
        if silent:
            return f"{_names(silent, now)} no longer answers; the others have waited {waited}"
        if len(behind) < len(now):
            return f"{_names(behind, now)} has made no progress {waited}, and the others wait for it"
        return f"all {len(now)} processes have waited for each other {waited}: a connection between them may be lost"

    def _end(self, reason: str) -> None:
        if self._is_over.is_set():
            return
        try:
            self._before_end()
            console.error(reason)
        finally:
            os._exit(int(Exit.PEER))  # the main thread waits in a library, and no exception would reach it


def in_background(run: Callable[[], object]) -> threading.Thread:
    """Start a thread that does not keep the process from ending."""
    thread = threading.Thread(target=run, name="loratune-watch", daemon=True)
    thread.start()
    return thread


def connected() -> TCPStore:
    """Return the store of the process group."""
    # A connection of its own: the process group's may be waiting.
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=READING_SECONDS))


def _signs(store: TCPStore) -> dict[int, _Sign]:
    signs = {}
    for number in range(process_count()):
        key = f"{PREFIX}/{number}"
        told = store.get(key).decode().split(" ", 2) if store.check([key]) else ["0", "0", "an unknown machine"]
        signs[number] = _Sign(int(told[0]), int(told[1]), told[2])
    return signs


def _names(numbers: list[int], signs: dict[int, _Sign]) -> str:
    return ", ".join(f"process {number} on {signs[number].host}" for number in numbers)
