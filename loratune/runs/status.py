"""status.json: how a run stands. It is read and written here alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loratune.errors import Exit, LoratuneError
from loratune.plain_files import read_json_object, require_folder
from loratune.runs.folder import STATUS, now
from loratune.runs.typed_json import as_typed
from loratune.writing import PROGRAM, write_json

MENDED = json.dumps({"program": PROGRAM, "state": "interrupted"})
"""Content for a damaged file, from which a run can be resumed or overwritten."""


@dataclass(frozen=True)
class Status:
    """A run's state, as its last process has left it."""

    state: Literal["running", "interrupted", "diverged", "failed", "finished"]
    """A run that was killed stays `running`."""
    time: str | None = None
    """Of the last change of state, ISO 8601."""
    step: int | None = None
    """Completed steps; None while it runs."""
    steps: int | None = None
    """Planned steps."""


def require_run(folder: Path) -> None:
    """Raise if a folder is no run's.

    Raises:
        LoratuneError: it is not there, or has no status.
    """
    require_folder(folder, "a run folder")
    if not (folder / STATUS).is_file():
        raise LoratuneError(f"{folder} holds no run (no {STATUS} in it)", Exit.MODEL)


def set_status(output: Path, state: str, **details: Any) -> None:
    """Replace a run's status."""
    write_json(output / STATUS, {"program": PROGRAM, "state": state, "time": now(), **details})


def read_status(output: Path) -> Status:
    """Read a run's status; keys that this version does not know are left out.

    Raises:
        LoratuneError: it is missing or damaged, or its state is none that loratune writes.
    """
    values = read_json_object(output / STATUS)
    try:
        return as_typed(Status, values, output / STATUS)
    except LoratuneError as error:
        raise LoratuneError(f"{error.message}; restore it, or write {MENDED} into it", Exit.MODEL) from error
