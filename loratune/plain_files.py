"""Files that somebody else has made: never a pipe that waits for a writer, never more than memory is meant for."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from loratune.errors import Exit, LoratuneError

CONFIG_BYTES = 20_000_000
"""More than any config takes; a chat template inside of one is some 100 kB."""
MOST_BYTES = 256 * 2**20
"""Of a file that is read whole; the largest vocabularies take some 40 MB."""

LONGEST_LINE = 16 * 2**20
"""Bytes; a longer one is damage, such as a hole that a crash of the system has left."""

SMALL_FILES = (".json", ".jinja", ".txt")
"""Endings of those that libraries read whole, too."""


def is_folder(path: str | Path) -> bool:
    """Whether a folder is there, whatever the name: `Path.is_dir` raises where one is too long, or holds a NUL."""
    return os.path.isdir(path)  # noqa: PTH112


def is_file(path: str | Path) -> bool:
    """Whether a file is there, whatever the name: as `is_folder`."""
    return os.path.isfile(path)  # noqa: PTH113


def open_plain(path: Path) -> BinaryIO:
    """Open a file for reading.

    Raises:
        OSError: it cannot be opened, or it is a folder, a pipe or a device.
    """
    # Without O_NONBLOCK a named pipe would wait for somebody to write into it.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a plain file", str(path))
    return file


def read_plain(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """All bytes of a file.

    Raises:
        OSError: it cannot be read, is no plain file, or is larger than `most_bytes`.
    """
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes; at most {most_bytes:,} are read", str(path))
        return file.read(most_bytes)


def bounded_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file; one that is longer than `LONGEST_LINE` comes in pieces."""
    return iter(lambda: file.readline(LONGEST_LINE), b"")


def reason_of(error: Exception) -> str:
    """Why a file could not be read, where its name has been said already."""
    return getattr(error, "strerror", None) or str(error)


def read_plain_text(path: Path, most_bytes: int = MOST_BYTES) -> str:
    """All of a file as UTF-8 text.

    Raises:
        OSError: as `read_plain`.
        UnicodeDecodeError: it is not UTF-8.
    """
    return read_plain(path, most_bytes).decode("utf-8")


def read_json_object(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        LoratuneError: the file is not there, no plain file, too large, no JSON, nested too deeply, or holds something
            else.
    """
    try:
        value = json.loads(read_plain_text(path, most_bytes))
    except (OSError, ValueError) as error:
        raise LoratuneError(f"{path}: cannot be read: {reason_of(error)}", Exit.MODEL) from error
    except RecursionError as error:
        raise LoratuneError(f"{path}: cannot be read: nested too deeply; fetch it again", Exit.MODEL) from error
    if not isinstance(value, dict):
        raise LoratuneError(f"{path}: holds no JSON object", Exit.MODEL)
    return value


def unfit_files(folder: Path) -> list[str]:
    """Names in a folder that no library should open: pipes, devices, and small files that have grown huge."""
    found = []
    for path in sorted(folder.iterdir()):
        try:
            status = path.stat()
        except OSError:  # a link to nothing
            continue
        is_huge = path.suffix in SMALL_FILES and status.st_size > MOST_BYTES
        if is_huge or not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            found.append(path.name)
    return found
