"""One run at a time in a folder."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from loratune.errors import Exit, LoratuneError
from loratune.runs.folder import LOCK, LOCK_OWNER


@contextmanager
def run_lock(output: Path) -> Iterator[None]:
    """Hold a run folder's lock, which the system takes back when the process ends, however it ends.

    The file stays, since a file that is removed and made again could be locked twice; but a folder in which nothing
    else has come to be goes again.

    Raises:
        LoratuneError: another process has it; with its number and machine.
    """
    output.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(output / LOCK), output / LOCK_OWNER
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise LoratuneError(
            f"{output} is in use by {_name(owner)}; wait for it, or choose another folder with --output", Exit.USAGE
        ) from error
    try:
        owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        yield
    finally:
        owner.unlink(missing_ok=True)
        if output.is_dir() and [path.name for path in output.iterdir()] == [LOCK]:
            (output / LOCK).unlink()
            output.rmdir()
        lock.release()


def _name(owner: Path) -> str:
    try:
        told = json.loads(owner.read_text())
        return f"process {told['pid']} on {told['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
