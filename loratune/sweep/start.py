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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.errors import Exit, Interrupted, LoratuneError
from loratune.model.nvidia import DEVICE, are_gpus_hidden
from loratune.recipe.sections import Recipe
from loratune.runtime import ENDING, signal_at_end_of_parent

if TYPE_CHECKING:
    from loratune.sweep.forgetting import Forgetting

PRELOADED = ["loratune.sweep.preload"]
"""What the server imports."""
GPU_FILES = (str(DEVICE), "/dev/dxg", "/dev/kfd")
"""One of them is there where a process may open a GPU: NVIDIA's, Windows' or AMD's."""


@dataclass(frozen=True)
class Order:
    """What a process is to do."""

    recipes: tuple[Recipe, ...]
    """One to train, or all that are to be rehearsed."""
    share: Fraction | None
    """Of the steps to train; None to rehearse."""
    log: Path
    """Where its output goes, behind what is there."""
    environment: Mapping[str, str]
    folder: Path
    """Its working folder."""


@dataclass(frozen=True)
class Ended:
    """What a process says at its end."""

    code: int
    message: str = ""
    result: Any = None


@dataclass(frozen=True)
class Trained:
    """What a process knows of its training beside what the run folder says."""

    peak_memory_bytes: int | None
    """None where the run was complete before."""
    forgetting: Forgetting | None = None
    """Of a complete run; None if it could not be measured."""


@dataclass(frozen=True)
class Rehearsal:
    """What is known of a sweep's trials before the first one."""

    steps: tuple[int, ...]
    """Of each recipe."""
    rows: str
    """Hash of all rows."""
    date: str | None
    """The day that a template writes into prompts, which all trials have to share."""
    gpus: int
    """How many GPUs torch sees."""
    bits_per_byte: Mapping[str, float] = field(default_factory=dict)
    """Base → what a validation loss in nats per token is multiplied with; empty where all trials have one base."""


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
