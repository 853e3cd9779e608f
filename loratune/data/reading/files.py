"""Opens a file or a hub dataset as a stream of rows."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable, Iterator
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow

from loratune.data.reading.character_sets import check_encoding, decode_blocks
from loratune.data.reading.csv_lines import rows_of_csv
from loratune.data.reading.hub import open_hub
from loratune.data.reading.json_document import check_object, rows_of_document
from loratune.data.reading.json_lines import holds_lines, rows_of_lines
from loratune.data.reading.parquet import rows_of_parquet
from loratune.data.reading.rows import BadRow, Row
from loratune.data.sources import FileKind, file_kind, hub_name
from loratune.errors import Exit, LoratuneError
from loratune.plain_files import is_file, nearest_told

__all__ = ["BadRow", "Row", "RowFile", "open_rows", "unreadable"]

BLOCK = 1 << 18
"""Number of bytes per read."""
CODECS = {"gz": "gzip", "zst": "zstd"}


class RowFile:
    """The rows of one file or dataset; created by `open_rows`."""

    def __init__(
        self,
        name: str,
        rows: Callable[[], Iterator[Row | BadRow]],
        fingerprint: Callable[[], str],
        *,
        is_lines: bool = False,
        is_file: bool = True,
    ) -> None:
        self.name = name
        self._rows = rows
        self._fingerprint = fingerprint
        self._is_lines = is_lines
        self._stamp = _stamp(name) if is_file else None

    def __iter__(self) -> Iterator[Row | BadRow]:
        """Read the rows from the start.

        Raises:
            LoratuneError: there are no rows, or the file is damaged, not in the encoding, or not valid JSON.
        """
        return self._rows()

    @cached_property
    def sha256(self) -> str:
        """For a file, the hash of its bytes on disk; for a dataset, the hash of its name, fingerprint and length."""
        return self._fingerprint()

    def place(self, number: int) -> str:
        """Return the file and line or row of a row number."""
        return f"{self.name}:{number}" if self._is_lines else f"{self.name} row {number}"

    def check_unchanged(self) -> None:
        """Raise if the file changed since it was opened.

        Raises:
            LoratuneError: its size or modification time differs.
        """
        if self._stamp and _stamp(self.name) != self._stamp:
            raise LoratuneError(f"{self.name}: changed while it was read; start again", Exit.DATA)


def open_rows(name: str, encoding: str = "utf-8") -> RowFile:
    """Open a file or a hub dataset for reading.

    Args:
        name: a name from `parse_source`.
        encoding: text encoding of files.

    Raises:
        LoratuneError: the file is missing or unreadable, or the encoding is unknown.
    """
    check_encoding(encoding)
    parts = hub_name(name)
    if parts:
        dataset = open_hub(name, parts)
        return RowFile(name, dataset.__iter__, dataset.sha256, is_file=False)
    kind = file_kind(name)
    if not kind:
        raise LoratuneError(f"{name}: not a file type that loratune reads", Exit.DATA)
    _check_readable(name)
    if kind.kind == "parquet":
        return RowFile(name, partial(rows_of_parquet, name), partial(_sha256, name))
    return _open_text(name, kind, encoding)


def _open_text(name: str, kind: FileKind, encoding: str) -> RowFile:
    def pieces() -> Iterator[str]:
        return decode_blocks(name, encoding, partial(_blocks, name, kind.compression))

    is_lines = kind.kind != "json" or holds_lines(pieces())
    read = rows_of_csv if kind.kind == "csv" else rows_of_lines if is_lines else rows_of_document
    check = cache(lambda: None if is_lines else check_object(name, pieces()))

    def rows() -> Iterator[Row | BadRow]:
        check()  # once, before the first row is used
        return read(name, pieces())

    return RowFile(name, rows, partial(_sha256, name), is_lines=is_lines)


def _blocks(name: str, compression: str | None = None) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file."""
    try:
        with _open(name, compression) as file:
            while block := file.read(BLOCK):
                yield block
    except OSError as error:
        if error.errno is None:  # what pyarrow raises for the content of a file
            raise LoratuneError(
                f"{name}: damaged or cut short: {error}; copy or download it again", Exit.DATA
            ) from error
        raise unreadable(name, error) from error


def _open(name: str, compression: str | None) -> Any:
    return pyarrow.input_stream(name, compression=CODECS[compression]) if compression else Path(name).open("rb")


def _sha256(name: str) -> str:
    digest = hashlib.sha256()
    for block in _blocks(name):
        digest.update(block)
    return digest.hexdigest()


def _check_readable(name: str) -> None:
    try:
        mode = Path(name).stat().st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
            Path(name).open("rb").close()
    except (OSError, ValueError) as error:
        raise unreadable(name, error) from error
    if not stat.S_ISREG(mode):
        raise LoratuneError(f"{name}: not a regular file, which can be read more than once; save it as one", Exit.DATA)


def _stamp(name: str) -> tuple[int, int] | None:
    try:
        found = Path(name).stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def unreadable(name: str, error: OSError | ValueError) -> LoratuneError:
    """Return the error for a file that cannot be opened: it is missing, or its disk is at fault."""
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return LoratuneError(f"{name}: cannot be read: {error.strerror}", Exit.IO)
    # ValueError: a NUL in the name
    near = nearest_told(Path(name), is_file)
    return LoratuneError(f"{name}: no such file (looked from {Path.cwd()}){near}", Exit.DATA)
