"""Where encoded rows are kept between runs, under a key of everything that they depend on."""

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
"""Entries that no run has read for so long are removed when a new one is written."""


def rows_folder() -> Path:
    """Where the entries lie."""
    return cache_folder("data")


PACKAGE = Path(__file__).resolve().parents[2]
ID_CODE = (
    *("data/checked_rows.py", "data/sources.py", "data/checks/broken_off.py", "data/checks/inspection.py"),
    *("data/encoding", "data/formats", "data/reading", "data/template", "data/tools"),
    "model/tokenizer.py",  # tells the renderer which tokens are special
)


def cache_key(parts: dict[str, Any]) -> str:
    """Name of an entry: a hash of what its rows depend on, and of the programs that make them.

    Args:
        parts: hashes of files and settings, in JSON types.
    """
    made_by = {name: _version_of(name) for name in ("transformers", "tokenizers")} | {"data": _hash_of_own_code()}
    return hashlib.sha256(json.dumps([parts, made_by], sort_keys=True).encode()).hexdigest()[:32]


@lru_cache
def _version_of(package: str) -> str:
    return version(package)


@lru_cache
def _hash_of_own_code() -> str:
    """A changed line in how rows are read or encoded makes new entries; no number has to be raised for it."""
    code = hashlib.sha256()
    for path in id_code():
        code.update(path.read_bytes())
    return code.hexdigest()


def id_code() -> list[Path]:
    """The modules whose lines decide which ids, labels and findings an entry holds."""
    return sorted(path for name in ID_CODE for path in ([PACKAGE / name] if name.endswith(".py") else _modules(name)))


def _modules(folder: str) -> Iterator[Path]:
    return (PACKAGE / folder).rglob("*.py")


@contextmanager
def entry_lock(key: str) -> Iterator[Path]:
    """The folder of an entry, held alone: of several processes one fills it and the others find it there.

    Raises:
        LoratuneError: the cache cannot be written.
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
    """Give a folder to fill that takes the entry's name at the end; old entries make room."""
    _remove_unused(entry.parent)
    with folder_in_one_step(entry) as folder:
        yield folder


def mark_used(entry: Path) -> None:
    """Note that an entry has been read today."""
    os.utime(entry)


def _remove_unused(folder: Path) -> None:
    oldest = time.time() - UNUSED_DAYS * 86400
    for entry in folder.iterdir():
        if entry.is_dir() and entry.stat().st_mtime < oldest:
            shutil.rmtree(entry, ignore_errors=True)
            entry.with_name(f"{entry.name}.lock").unlink(missing_ok=True)
