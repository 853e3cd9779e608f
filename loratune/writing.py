"""Writing so that a name holds either the whole thing or what was there before."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loratune.errors import Exit, LoratuneError

TORCH_WRITER_ERRORS = ("iostream error", "unexpected pos", "PytorchStreamWriter failed")
"""What torch.save says instead."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


def current_umask() -> int:
    """The process's umask; the system tells it only by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def apply_umask(folder: Path) -> None:
    """Give files the mode that the umask asks for; safetensors 0.8 writes 0600 whatever it is (safetensors#782)."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~current_umask())


def write_text(path: Path, text: str) -> None:
    """Replace a file's text in one step that survives a power cut."""
    write_pieces(path, [text.encode()])


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """Replace a file, piece by piece, so that its name holds the whole of them or what was there before."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace a file by a value as JSON."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2) + "\n")


@contextmanager
def disk_errors_explained(output: Path) -> Iterator[None]:
    """Turn what a disk refuses into one message.

    Raises:
        LoratuneError: something could not be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise LoratuneError(
            f"{error.filename or output}: cannot be written: {error.strerror}. What had been saved before is "
            "untouched; make room, or choose another folder with --output",
            Exit.IO,
        ) from error
    except RuntimeError as error:
        if not any(words in str(error) for words in TORCH_WRITER_ERRORS):
            raise
        raise LoratuneError(
            f"{output}: a file cannot be written: the disk is full, or files may not be so large. What had been saved "
            "before is untouched; make room, or choose another folder with --output",
            Exit.IO,
        ) from error


def staging_place(target: Path) -> Path:
    """Where a folder is built before it takes its name; the same for every process of a run."""
    return target.with_name(f".tmp-{target.name}")


@contextmanager
def folder_in_one_step(target: Path) -> Iterator[Path]:
    """Give a temporary sibling to fill; it takes the target's name at the end, and vanishes on an error."""
    beside, aside = staging_place(target), target.with_name(f".old-{target.name}")
    if aside.exists() and not target.exists():  # a process was killed between the two renames
        aside.rename(target)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        apply_umask(beside)
        for path in beside.rglob("*"):
            if path.is_file():
                _sync_file(path)
        sync_folder(beside)
        shutil.rmtree(aside, ignore_errors=True)
        if target.exists():
            target.rename(aside)
        beside.rename(target)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.rename(target)
        shutil.rmtree(beside, ignore_errors=True)
        raise
    sync_folder(target.parent)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
