"""Starts a training in the background."""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from loratune.errors import LoratuneError
from loratune.mcp_server.calls import Calls, Document, read_document
from loratune.runs.folder import STATUS
from loratune.runs.lock import is_held_by
from loratune.runs.status import read_status

POLL_SECONDS = 0.2


class StartedTraining(TypedDict):
    """A training that runs apart from the server, or has ended already."""

    output: str
    """The run folder."""
    process: int
    """ID of its process; SIGTERM ends it after its step, with a checkpoint."""
    log: str
    """File with its messages."""
    state: dict[str, Any]
    """The document of `runs show`, or the one that `sft` has ended with."""


async def start_training(calls: Calls, words: list[str], output: Path) -> Document:
    """Start `sft`, and wait until its run folder says that it is running, or it has ended.

    A training that is refused leaves nothing. If the caller gives up waiting, the training goes on.

    Args:
        calls: runs it.
        words: its command line.
        output: the run folder.

    Returns:
        The keys of `StartedTraining`, or the document of the error with which it was refused.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(".log", f"{output.name}-", output.parent)
    os.close(handle)
    log = Path(name)
    result = log.with_suffix(".json")
    process = calls.start(words, result, log)
    while process.poll() is None and not _is_running(output, process):
        await asyncio.sleep(POLL_SECONDS)
    if process.poll() is None:
        state = await calls.run("runs", "show", str(output))
        return {"output": str(output), "process": process.pid, "log": str(log), "state": state}
    state = read_document(result, log)
    if process.returncode != 0 and state["schema"].startswith("loratune/error/"):
        log.unlink()
        result.unlink()
        return state
    return {"output": str(output), "process": process.pid, "log": str(log), "state": state}


def _is_running(output: Path, process: subprocess.Popen[bytes]) -> bool:
    """Return whether the folder is this process's run; an interrupted one that is resumed has a status before."""
    try:
        is_its_own = (output / STATUS).is_file() and is_held_by(output, process.pid)
        return is_its_own and read_status(output).state == "running"
    except LoratuneError:
        return False  # it is being written
