"""Detects the main process, and installs signal handlers."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that users, systems and terminals send to end a process."""
REPEATED_SECONDS = 0.5
"""SIGTERM within this time of another is the same request: Slurm sends both, 10 ms apart, when it preempts a job."""
PASSED_ON = getattr(signal, "SIGUSR2", None)
"""The signal that a process of `loratune sft --gpus` gets for each one that is to end the run."""
LAUNCHER = "LORATUNE_LAUNCHER"
"""Environment variable of such a process; its value is the process ID of its launcher."""
PARENT = os.getppid()
"""The process that has started this one; the system gives a process another parent when its own has ended."""
PR_SET_PDEATHSIG = 1  # from sys/prctl.h

Handler = Callable[[int, FrameType | None], object]


def silence_libraries() -> None:
    """Hide the libraries' warnings, which are for developers; loratune reports what users need to know."""
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def is_started_by_loratune() -> bool:
    """Whether `loratune sft --gpus` has started this process, and tells the user how it ends."""
    return os.environ.get(LAUNCHER) == str(PARENT)


def is_launched() -> bool:
    """Whether a launcher such as torchrun started this process; RANK and WORLD_SIZE alone may be left over from one."""
    return "MASTER_ADDR" in os.environ


def is_main_process() -> bool:
    """Return whether this process prints and writes files; a launcher starts several copies and numbers them."""
    return process_number() == 0


def process_number() -> int:
    """Return the number that a launcher has given this copy of the program, from 0."""
    rank = os.environ.get("RANK", "")
    return int(rank) if is_launched() and rank.isdecimal() and int(rank) < process_count() else 0


def process_count() -> int:
    """Return how many copies of the program a launcher has started, over all machines."""
    count = os.environ.get("WORLD_SIZE", "")
    return max(1, int(count)) if is_launched() and count.isdecimal() else 1


def is_on_one_machine() -> bool:
    """Whether all copies run on this machine, as far as the launcher says how many it has started here."""
    return os.environ.get("LOCAL_WORLD_SIZE", "1") == str(process_count())


def end_with_launcher() -> None:
    """Have the system signal the launcher's death, so that no process is left without one; Linux only."""
    if PASSED_ON is not None and is_started_by_loratune():
        signal_at_end_of_parent(PASSED_ON, lambda: os.getppid() == PARENT)


def signal_at_end_of_parent(number: int, has_parent: Callable[[], bool]) -> None:
    """Have the system signal this process when the one that has forked it ends; Linux only.

    Args:
        number: the signal.
        has_parent: whether that process still lives, for one that ended before the system knew.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
    if not has_parent():
        os.kill(os.getpid(), number)


def program(module: str) -> tuple[str, ...]:
    """Return the words that run a module with this Python.

    With -m alone, Python imports the working folder's files first, such as a user's datasets.py.
    """
    is_apart = sys.version_info >= (3, 11) and str(Path.cwd()) not in sys.path  # Python 3.10 has no -P
    return (sys.executable, *(("-P",) if is_apart else ()), "-m", module)


def launch_problems() -> list[str]:
    """Return what is wrong with the variables from which loratune and accelerate conclude who started this process."""
    problems = []
    for name, least in (("LOCAL_RANK", 0), ("WORLD_SIZE", 1)):
        value = os.environ.get(name)
        if value is None:
            continue
        if not value.isdecimal() or int(value) < least:
            problems.append(f"{name} is {value!r}, where torchrun sets a number from {least}")
        elif not is_launched() and (name == "LOCAL_RANK" or int(value) > 1):
            problems.append(f"{name} is set, but MASTER_ADDR is not, which torchrun sets too")
    if LAUNCHER in os.environ and not is_started_by_loratune():
        problems.append(f"{LAUNCHER} is {os.environ[LAUNCHER]!r}, which is not the process that has started this one")
    return problems


def heed_interrupts() -> None:
    """Have SIGINT interrupt this process as usual, also where a script has started it in the background.

    A shell without job control has such processes ignore SIGINT. A server is ended by it nevertheless, since it has
    no other end.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def signals_to(handler: Handler, numbers: Sequence[int] = ENDING) -> Iterator[None]:
    """Handle signals, and restore the previous handlers at the end.

    Ignored signals stay ignored, as nohup and background jobs set them. Outside the main thread, which alone may set
    handlers, it has no effect. SIGTERM that repeats another within `REPEATED_SECONDS` is dropped.

    Args:
        handler: called with the signal's number and the frame.
        numbers: the signals to handle.
    """
    taken = {}
    handlers = _handlers(_without_repetitions(handler), numbers)
    if threading.current_thread() is threading.main_thread():
        known = {number: signal.getsignal(number) for number in handlers}
        taken = {number: before for number, before in known.items() if before not in (signal.SIG_IGN, None)}
    for number in taken:
        signal.signal(number, handlers[number])
    try:
        yield
    finally:
        for number, before in taken.items():
            signal.signal(number, before)


def _handlers(handler: Handler, numbers: Sequence[int]) -> Mapping[int, Handler]:
    if PASSED_ON is None or not is_started_by_loratune():
        return dict.fromkeys(numbers, handler)
    # Schedulers send a signal to every process; here only the one that the launcher passes on counts, and counts once.
    return dict.fromkeys(numbers, lambda *_: None) | {int(PASSED_ON): handler}


def _without_repetitions(handler: Handler) -> Handler:
    newest = float("-inf")

    def heed(number: int, frame: FrameType | None) -> None:
        nonlocal newest
        if number == signal.SIGTERM:
            before, newest = newest, time.monotonic()
            if newest - before < REPEATED_SECONDS:
                return
        handler(number, frame)

    return heed
