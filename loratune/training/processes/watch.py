"""Ends a run of several processes in which one has stopped working, and says which."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

from torch.distributed import TCPStore

from loratune import console
from loratune.errors import Exit
from loratune.runtime import process_count, process_number

PULSE_SECONDS = 1.0
"""Between two reports of a process to the store of the process group."""
READING_SECONDS = 5
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
    process group, and compares it with the others' when there was none for too long.

    Args:
        seconds: how long a process may take from one call of `advance` or `keep_alive` to the next.
        before_end: called with the reason before the process ends with exit code `Exit.PEER`.
    """

    def __init__(self, seconds: float, before_end: Callable[[str], None]) -> None:
        self._seconds, self._before_end = seconds, before_end
        self._progress, self._pulse, self._newest = 0, 0, time.monotonic()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="loratune-watch", daemon=True)

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
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()

    def _watch(self) -> None:
        try:
            store = _connected()
            self._report(store)
            while not self._is_over.wait(PULSE_SECONDS):
                self._report(store)
                if time.monotonic() - self._newest > self._seconds:
                    self._end(self._diagnosis(store))
        except RuntimeError:  # the store is gone with the process that holds it
            if not self._is_over.wait(self._seconds):
                self._end("the connection to the first process was lost")

    def _report(self, store: TCPStore) -> None:
        self._pulse += 1
        own = f"{self._progress} {self._pulse} {socket.gethostname()}"
        store.set(f"{PREFIX}/{process_number()}", own)

    def _diagnosis(self, store: TCPStore) -> str:
        """Compare the processes' reports at two moments."""
        before = _signs(store)
        if self._is_over.wait(3 * PULSE_SECONDS):
            return ""
        self._report(store)
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
            self._before_end(reason)
            console.error(reason)
        finally:
            os._exit(int(Exit.PEER))  # the main thread waits in a library, and no exception would reach it


def _connected() -> TCPStore:
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
