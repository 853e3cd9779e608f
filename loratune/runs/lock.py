"""One run at a time in a folder, and no reading of what a run is about to replace."""

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


@contextmanager
def run_lock(output: Path) -> Iterator[None]:
    """Hold a run folder's lock, which the system takes back when the process ends, however it ends.

    The file stays, since a file that is removed and made again could be locked twice; but a folder in which nothing
    else has come to be goes again.

    Raises:
        LoratuneError: another process has it, with its number and machine; or it cannot be made.
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
        lock.acquire(timeout=0)
    except Timeout as error:
        raise LoratuneError(
            f"{output} is in use by {_name(output)}; wait for it, or choose another folder with --output", Exit.USAGE
        ) from error
    except OSError as error:
        raise LoratuneError(
            f"{output}: cannot be made and locked: {error.strerror}; choose another folder with --output", Exit.IO
        ) from error
    return lock


def lock_holder(run: Path) -> str | None:
    """The process that has a run folder's lock, in words; None if nobody has it."""
    if not (run / LOCK).is_file():
        return None
    lock = FileLock(run / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return _name(run)
    except OSError:  # the folder may not be written to: what the holder has left there tells
        return _name(run) if _is_alive(_owner(run)) else None
    lock.release()
    return None


def _is_alive(owner: dict[str, Any]) -> bool:
    """Whether a process may still run; of another machine's nobody can tell."""
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
