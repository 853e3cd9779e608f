"""The lock of a run folder: one run at a time, and no reading of what a run may replace."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from loratune.errors import Exit, LoratuneError
from loratune.plain_files import read_plain_text
from loratune.runs.folder import LOCK, LOCK_OWNER
from loratune.writing import write_json

ASKED_SECONDS = 0.2
"""A command that asks whether a run still trains holds its lock for less than this."""


@contextmanager
def run_lock(output: Path) -> Iterator[None]:
    """Hold a run folder's lock, which the system releases when the process ends.

    The file is kept, because removing and recreating it would allow two locks; only a folder with nothing else is
    removed.

    Raises:
        LoratuneError: another process holds it (with pid and host), or it cannot be created.
    """
    owner = output / LOCK_OWNER
    lock = _acquired(output)
    try:
        write_json(owner, {"pid": os.getpid(), "host": socket.gethostname()})
        yield
    finally:
        owner.unlink(missing_ok=True)
        if output.is_dir() and [path.name for path in output.iterdir()] == [LOCK]:
            (output / LOCK).unlink()
            output.rmdir()
        lock.release()


def _acquired(output: Path) -> FileLock:
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / LOCK)
        lock.acquire(timeout=ASKED_SECONDS)
    except Timeout as error:
        raise in_use(output) from error
    except OSError as error:
        raise LoratuneError(
            f"{output}: cannot be made and locked: {error.strerror}; choose another folder with --output", Exit.IO
        ) from error
    return lock


def in_use(output: Path) -> LoratuneError:
    """Return the error of a command that would write where another process trains."""
    return LoratuneError(
        f"{output} is in use by {_name(output)}; wait for it, or choose another folder with --output", Exit.USAGE
    )


def lock_holder(run: Path) -> str | None:
    """Return a description of the process that holds a run folder's lock; None if nobody does."""
    if not (run / LOCK).is_file():
        return None
    lock = FileLock(run / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return _name(run)
    except OSError:  # read-only folder: use the record of the holder
        return _name(run) if _is_alive(_owner(run)) else None
    lock.release()
    return None


def is_held_by(run: Path, pid: int) -> bool:
    """Return whether a process of this machine has taken a run folder's lock."""
    owner = _owner(run)
    return (owner.get("host"), owner.get("pid")) == (socket.gethostname(), pid)


def _is_alive(owner: dict[str, Any]) -> bool:
    """Return whether a process may be alive; for another machine's it is assumed."""
    if owner.get("host") != socket.gethostname():
        return bool(owner)
    try:
        os.kill(int(owner["pid"]), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError, ValueError, TypeError, KeyError):
        return False
    return True


def _owner(run: Path) -> dict[str, Any]:
    try:
        told = json.loads(read_plain_text(run / LOCK_OWNER))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


def _name(run: Path) -> str:
    owner = _owner(run)
    return f"process {owner['pid']} on {owner['host']}" if {"pid", "host"} <= owner.keys() else "another process"
