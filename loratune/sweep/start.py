"""The process of a trial, from its start: what it inherits, where it writes, and how its end is told.

Processes are forked by a server that has imported what a training needs, which takes seconds each time otherwise. With
a GPU, each process imports by itself: bitsandbytes opens the GPU when it is imported, and a process that is forked
after that cannot open it again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from loratune.errors import Exit, Interrupted, LoratuneError
from loratune.model.nvidia import DEVICE, are_gpus_hidden
from loratune.runtime import ENDING, signal_at_end_of_parent
from loratune.sweep.messages import Ended, Order

PRELOADED = ["loratune.sweep.preload"]
"""What the server imports."""
GPU_FILES = (str(DEVICE), "/dev/dxg", "/dev/kfd")
"""One of them is there where a process may open a GPU: NVIDIA's, Windows' or AMD's."""


def context() -> Any:
    """Return the way in which processes are started."""
    if not are_gpus_hidden() and any(Path(file).exists() for file in GPU_FILES):
        return multiprocessing.get_context("spawn")
    started = multiprocessing.get_context("forkserver")
    started.set_forkserver_preload(PRELOADED)
    return started


def main(order: Order, pipe: Connection) -> None:
    """Carry out an order, and end with the exit code that the same command would have."""
    os.setsid()  # a terminal's Ctrl-C reaches the sweep alone, which passes it on
    for number in ENDING:  # a handler of the process that has forked this one is not for a trial
        signal.signal(number, signal.SIG_DFL)
    signal_at_end_of_parent(signal.SIGTERM, _has_parent)
    os.environ.clear()
    os.environ.update(order.environment)
    os.chdir(order.folder)
    _write_to(order.log)
    ended = _ended(lambda: _work(order))
    if ended.message:
        sys.stderr.write(f"{ended.message}\n")
    pipe.send(ended)
    sys.exit(ended.code)


def _has_parent() -> bool:
    parent = multiprocessing.parent_process()
    return parent is not None and parent.is_alive()


def _work(order: Order) -> Any:
    from loratune.sweep.work import rehearse, train_share

    return train_share(order.recipes[0], order.share) if order.share else rehearse(order.recipes)


def _ended(work: Callable[[], Any]) -> Ended:
    try:
        return Ended(Exit.OK, result=work())
    except LoratuneError as error:
        return Ended(error.exit_code, error.message)
    except Interrupted as error:
        return Ended(128 + error.signal_number)
    except OSError as error:
        return Ended(Exit.IO, f"{error.filename or ''}: {error.strerror or error}")
    except MemoryError as error:
        return Ended(Exit.IO, f"out of memory: {error}")
    except Exception as error:
        traceback.print_exc()
        return Ended(Exit.BUG, f"{type(error).__name__}: {error}")


def _write_to(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
