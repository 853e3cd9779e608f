"""Reads files of unknown origin: never blocks on a pipe, and limits their size."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from loratune.errors import Exit, LoratuneError
from loratune.nearest import nearest
from loratune.printable import LONGEST_PATH, shortened

CONFIG_BYTES = 20_000_000
"""Larger than any config; a chat template within one takes about 100 kB."""
MOST_BYTES = 256 * 2**20
"""Maximum size of a file that is read whole; the largest vocabularies take about 40 MB."""

LONGEST_LINE = 16 * 2**20
"""In bytes; a longer line is damage, such as a hole left by a system crash."""

SHOWN_NAMES = 20

SMALL_FILES = (".json", ".jinja", ".txt")
"""Suffixes of files that libraries read whole, too."""


def is_folder(path: str | Path) -> bool:
    """Return whether a path is a folder; unlike `Path.is_dir`, long names and NUL do not raise."""
    return os.path.isdir(path)  # noqa: PTH112


def is_file(path: str | Path) -> bool:
    """Return whether a path is a file; see `is_folder`."""
    return os.path.isfile(path)  # noqa: PTH113


def require_folder(path: Path, instead: str = "") -> None:
    """Raise if a path is no folder.

    Args:
        path: what was given.
        instead: what to give.

    Raises:
        LoratuneError: it is none.
    """
    if not is_folder(path):
        advice = f"; give {instead}" if instead else ""
        problem = "a file, not a folder" if is_file(path) else f"no such folder{nearest_told(path, is_folder)}"
        raise LoratuneError(f"{shortened(str(path), LONGEST_PATH)}: {problem}{advice}", Exit.MODEL)


def nearest_told(path: Path, fits: Callable[[Path], bool]) -> str:
    """Return a hint at what `nearest_beside` finds; empty if there is nothing."""
    near = nearest_beside(path, fits)
    return f"; did you mean {near}?" if near else ""


def nearest_beside(path: Path, fits: Callable[[Path], bool]) -> str:
    """Return the path beside a missing one whose name is most like its own; empty if there is none.

    Args:
        path: what was given.
        fits: whether a path beside it may be meant.
    """
    try:
        beside = [other for other in path.parent.iterdir() if fits(other)]
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return ""
    # A suffix in common makes no names alike, and another one no names unlike.
    stem = nearest(path.stem, {other.stem for other in beside})
    alike = {other.name: other for other in beside if other.stem == stem}
    return shortened(str(alike[nearest(path.name, alike, least=0)]), LONGEST_PATH) if alike else ""


def open_plain(path: Path) -> BinaryIO:
    """Open a file for reading.

    Raises:
        OSError: it cannot be opened, or is a folder, pipe or device.
    """
    # Without O_NONBLOCK, opening a named pipe would wait for a writer.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return file


def read_plain(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """Return all bytes of a file.

    Raises:
        OSError: it cannot be read, is not a regular file, or is larger than `most_bytes`.
    """
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes; at most {most_bytes:,} are read", str(path))
        return file.read(most_bytes)


def bounded_lines(file: BinaryIO) -> Iterator[bytes]:
    """Iterate over the lines of a file; lines longer than `LONGEST_LINE` are split."""
    return iter(lambda: file.readline(LONGEST_LINE), b"")


def reason_of(error: Exception) -> str:
    """Return why a file could not be read, without its name."""
    return getattr(error, "strerror", None) or str(error)


def read_plain_text(path: Path, most_bytes: int = MOST_BYTES) -> str:
    """Return a file's content as UTF-8 text.

    Raises:
        OSError: see `read_plain`.
        UnicodeDecodeError: it is not UTF-8.
    """
    return read_plain(path, most_bytes).decode("utf-8")


def read_json(path: Path, most_bytes: int = MOST_BYTES) -> Any:
    """Return the JSON value in a file.

    Raises:
        LoratuneError: the file is missing, not regular, too large, invalid JSON, or nested too deeply.
    """
    try:
        return json.loads(read_plain_text(path, most_bytes))
    except (OSError, ValueError) as error:
        raise LoratuneError(f"{path}: cannot be read: {reason_of(error)}", Exit.MODEL) from error
    except RecursionError as error:
        raise LoratuneError(f"{path}: cannot be read: nested too deeply; fetch it again", Exit.MODEL) from error


def read_json_object(path: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        LoratuneError: see `read_json`; or it is not an object.
    """
    value = read_json(path, most_bytes)
    if not isinstance(value, dict):
        raise LoratuneError(f"{path}: not a JSON object", Exit.MODEL)
    return value


def require_plain_files(folder: Path) -> None:
    """Refuse a folder in which a library could open a pipe, a device, or a file that is far too large.

    Libraries read files of a folder and of its own folders, also where these are links; hidden ones are left out.

    Raises:
        LoratuneError: lists them.
    """
    paths = [*folder.glob("*"), *(path for path in folder.glob("*/*") if not path.parent.name.startswith("."))]
    if unfit := sorted(path.relative_to(folder).as_posix() for path in paths if _is_unfit(path)):
        listed = ", ".join(unfit[:SHOWN_NAMES]) + (", …" if len(unfit) > SHOWN_NAMES else "")
        raise LoratuneError(
            f"{folder}: not regular files, or far too large, and therefore not read: {listed}", Exit.MODEL
        )


def _is_unfit(path: Path) -> bool:
    try:
        status = path.stat()
    except OSError:  # a dangling link
        return False
    is_huge = path.suffix in SMALL_FILES and status.st_size > MOST_BYTES
    return is_huge or not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode))
