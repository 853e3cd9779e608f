"""The cache of encoded rows. The key covers all inputs of the encoding."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from loratune.caches import cache_folder
from loratune.errors import Exit, LoratuneError
from loratune.writing import DISK_ERRORS, folder_in_one_step

UNUSED_DAYS = 30
"""Entries that no run has read for this many days are removed when a new one is written."""


def rows_folder() -> Path:
    return cache_folder("data")


PACKAGE = Path(__file__).resolve().parents[2]
ID_CODE = (
    *("data/checked_rows.py", "data/sources.py", "data/checks/broken_off.py", "data/checks/inspection.py"),
    *("data/encoding", "data/formats", "data/reading", "data/template", "data/tools"),
    "model/tokenizer.py",  # decides which tokens are special
)


def cache_key(parts: dict[str, Any]) -> str:
    """Return the name of a cache entry: a hash of its inputs and of the code that encodes them.

    Args:
        parts: hashes of files, and settings, as JSON types.
    """
    made_by = {name: _version_of(name) for name in ("transformers", "tokenizers")} | {"data": _hash_of_own_code()}
    return hashlib.sha256(json.dumps([parts, made_by], sort_keys=True).encode()).hexdigest()[:32]


@lru_cache
def _version_of(package: str) -> str:
    return version(package)


@lru_cache
def _hash_of_own_code() -> str:
    """Hash the encoding code, so that any change to it invalidates old entries without a version number."""
    code = hashlib.sha256()
    for path in id_code():
        code.update(path.read_bytes())
    return code.hexdigest()


def id_code() -> list[Path]:
    """Return the modules that determine the ids, labels and findings of an entry."""
    return sorted(path for name in ID_CODE for path in ([PACKAGE / name] if name.endswith(".py") else _modules(name)))


def _modules(folder: str) -> Iterator[Path]:
    return (PACKAGE / folder).rglob("*.py")


@contextmanager
def entry_lock(key: str) -> Iterator[Path]:
    """Lock an entry and yield its path: one of several processes fills it, the others then find it complete.

    Raises:
        LoratuneError: the cache is not writable.
    """
    folder = rows_folder()
    lock = FileLock(folder / f"{key}.lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise _not_writable(error, folder) from error
    try:
        yield folder / key
    except OSError as error:
        if error.errno not in DISK_ERRORS or not str(error.filename or folder).startswith(str(folder)):
            raise
        raise _not_writable(error, folder) from error
    finally:
        lock.release()


def _not_writable(error: OSError, folder: Path) -> LoratuneError:
    return LoratuneError(
        f"{error.filename or folder}: cannot be written: {error.strerror}. Encoded rows are kept there; make room, or "
        "set LORATUNE_CACHE to another folder",
        Exit.IO,
    )


@contextmanager
def new_entry(entry: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to the entry on success. Unused entries are removed first."""
    _remove_unused(entry.parent)
    with folder_in_one_step(entry) as folder:
        yield folder


def mark_used(entry: Path) -> None:
    """Set the entry's modification time to now."""
    os.utime(entry)


def _remove_unused(folder: Path) -> None:
    oldest = time.time() - UNUSED_DAYS * 86400
    for entry in folder.iterdir():
        if entry.is_dir() and entry.stat().st_mtime < oldest:
            shutil.rmtree(entry, ignore_errors=True)
            entry.with_name(f"{entry.name}.lock").unlink(missing_ok=True)
