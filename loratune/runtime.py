"""What a process asks of its surroundings: whether it is the main one, and which signals end it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals by which users, systems and terminals end a process."""


def is_main_process() -> bool:
    """Whether this is the process that speaks and writes files.

    torchrun starts the same program several times and numbers the copies; RANK alone may be anybody's variable.
    """
    rank, copies = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    is_copy = rank.isdecimal() and copies.isdecimal() and int(rank) < int(copies)
    return not is_copy or int(rank) == 0


@contextmanager
def signals_to(handler: Callable[[int, FrameType | None], object], numbers: Sequence[int] = ENDING) -> Iterator[None]:
    """Take signals over, and give them back at the end.

    Those that are ignored stay so, as nohup and background jobs have set them. Outside the main thread, the only one
    that may set handlers, nothing happens.

    Args:
        handler: gets the signal's number.
        numbers: which.
    """
    taken = {}
    if threading.current_thread() is threading.main_thread():
        known = {number: signal.getsignal(number) for number in numbers}
        taken = {number: before for number, before in known.items() if before not in (signal.SIG_IGN, None)}
    for number in taken:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in taken.items():
            signal.signal(number, before)
