"""Whether files can be written to a folder, and how much space there is."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from loratune.caches import cache_folder
from loratune.doctor.facts import Place

TRIAL_BYTES = 1 << 20
"""Size of the file that is written: space, inodes, quota and permission are all asked for by that."""


def place(kind: str, folder: str) -> Place:
    """Write and remove a file in a folder, or in the nearest one above it that exists.

    Args:
        kind: `output`, `model cache`, `row cache` or `temporary files`.
        folder: the output; the other folders are found as those who write to them find them.
    """
    path = _folder(kind, folder).expanduser().absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    try:
        with tempfile.NamedTemporaryFile(dir=path, prefix=".loratune-") as file:
            file.write(os.urandom(TRIAL_BYTES))
            file.flush()
            os.fsync(file.fileno())
        reason = ""
    except OSError as error:
        reason = error.strerror or str(error)
    return Place(str(path), shutil.disk_usage(path).free, reason)


def _folder(kind: str, output: str) -> Path:
    match kind:
        case "output":
            return Path(output)
        case "model cache":
            from huggingface_hub.constants import HF_HUB_CACHE

            return Path(HF_HUB_CACHE)
        case "row cache":
            return cache_folder("data")
        case _:
            return Path(os.environ.get("TMPDIR") or "/tmp")  # tempfile passes over one that cannot be written to
