"""Caches hashes of large files between runs of the program.

A hash is keyed by the file's path, size, inode, and times of change; links are followed, as in hub caches. Bit rot
changes none of these; it only shows when the file is hashed again.
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
"""A file changed more recently than this could change again within one tick of its file system's clock."""
UNUSED_DAYS = 90
FILES = "files"


def remembered_sha256(path: Path) -> str:
    """Return the hex sha256 of a file, cached until the file is changed."""
    identity = identity_of(path)
    known = recall(FILES, path, identity)
    if known is None:
        known = {"sha256": file_sha256(path)}
        remember(FILES, path, identity, known)
    return known["sha256"]


def identity_of(path: Path) -> tuple[int, ...]:
    """Return what changes with a file: size, mtime and ctime in ns, inode and device."""
    about = path.stat()
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino, about.st_dev


def recall(kind: str, path: Path, identity: tuple[int, ...]) -> dict[str, str] | None:
    """Return cached values of a file; None if there are none, or they are damaged.

    Args:
        kind: folder of the cache.
        path: the file.
        identity: present result of `identity_of`.
    """
    try:
        entry = _entry(kind, path, identity)
        known = json.loads(entry.read_text(encoding="utf-8"))
        with suppress(OSError):
            os.utime(entry)
        if known["sha256"] != _sum(known["values"]):
            return None
    except (OSError, LoratuneError, ValueError, TypeError, KeyError):  # missing, no home folder, or damaged
        return None
    return dict(known["values"])


def remember(kind: str, path: Path, identity: tuple[int, ...], values: dict[str, str]) -> None:
    """Cache values of a file; failures to write are ignored.

    Args:
        kind, path: see `recall`.
        identity: identity before the file was read.
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
