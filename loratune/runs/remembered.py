"""Hashes of large files, remembered between calls.

What was computed of a file is remembered by its place, size, inode, and the times of its last changes; links are
followed, as those of a hub's cache are. Bytes that rot on the disk change none of these, and show when the file is
hashed anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from loratune.caches import cache_folder
from loratune.errors import LoratuneError
from loratune.runs.folder import file_sha256
from loratune.writing import write_json

SETTLED_NS = 2_000_000_000
"""A file that was changed less long ago could change again within the same tick of its file system's clock."""
UNUSED_DAYS = 90
FILES = "files"


def remembered_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes, computed once for as long as the file is not touched."""
    identity = identity_of(path)
    known = recall(FILES, path, identity)
    if known is None:
        known = {"sha256": file_sha256(path)}
        remember(FILES, path, identity, known)
    return known["sha256"]


def identity_of(path: Path) -> tuple[int, ...]:
    """What changes when somebody changes a file: size, times of its last changes in ns, inode and device."""
    about = path.stat()
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino, about.st_dev


def recall(kind: str, path: Path, identity: tuple[int, ...]) -> dict[str, str] | None:
    """What is remembered of a file; None if that is nothing, or damaged.

    Args:
        kind: folder of the cache.
        path: the file.
        identity: as `identity_of` gives it now.
    """
    try:
        entry = _entry(kind, path, identity)
        known = json.loads(entry.read_text(encoding="utf-8"))
        with suppress(OSError):
            os.utime(entry)
        if known["sha256"] != _sum(known["values"]):
            return None
    except (OSError, LoratuneError, ValueError, TypeError, KeyError):  # none, no home for it, or damaged
        return None
    return dict(known["values"])


def remember(kind: str, path: Path, identity: tuple[int, ...], values: dict[str, str]) -> None:
    """Keep what was computed of a file; a cache that cannot be written costs nothing but that.

    Args:
        kind, path: as of `recall`.
        identity: as it was before the file was read.
        values: JSON texts.
    """
    is_settled = time.time_ns() - max(identity[1:3]) > SETTLED_NS
    if identity_of(path) != identity or not is_settled:
        return
    try:
        entry = _entry(kind, path, identity)
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_json(entry, {"file": str(path.resolve()), "values": values, "sha256": _sum(values)})
        oldest = time.time() - UNUSED_DAYS * 86400
        for other in entry.parent.glob("*.json"):
            if other.stat().st_mtime < oldest:
                other.unlink(missing_ok=True)
    except (OSError, LoratuneError):
        return


def _entry(kind: str, path: Path, identity: tuple[int, ...]) -> Path:
    key = json.dumps([str(path.resolve()), identity])
    return cache_folder(kind) / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _sum(values: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
