"""Detects the main process, and installs signal handlers."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Signals that users, systems and terminals send to end a process."""


def is_main_process() -> bool:
    """Return whether this process prints and writes files.

    torchrun starts several copies of the program and numbers them; RANK alone may be an unrelated variable.
    """
    rank, copies = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    is_copy = rank.isdecimal() and copies.isdecimal() and int(rank) < int(copies)
    return not is_copy or int(rank) == 0


@contextmanager
def signals_to(handler: Callable[[int, FrameType | None], object], numbers: Sequence[int] = ENDING) -> Iterator[None]:
    """Handle signals, and restore the previous handlers at the end.

    Ignored signals stay ignored, as nohup and background jobs set them. Outside the main thread, which alone may set
    handlers, it has no effect.

    Args:
        handler: called with the signal's number and the frame.
        numbers: the signals to handle.
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
