"""Reads one source's encoded rows and their metadata from a memory-mapped Arrow file."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from loratune.data.checked_rows import ReadingLog
from loratune.data.checks.inspection import FLAGS
from loratune.errors import counted

if TYPE_CHECKING:
    from loratune.data.encoding.tokens import Ids


ROWS, INFO = "rows.arrow", "info.json"
CUT, UNENDED = 1 << len(FLAGS), 2 << len(FLAGS)
"""Flags that follow the inspection's: the row was truncated; one of its answers has no end token."""
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("number", pa.int64()),
        ("digest", pa.uint64()),
        ("asked", pa.uint64()),
        ("flags", pa.int32()),
        ("tokens", pa.int32()),
        ("trained", pa.int32()),
        ("lost", pa.int32()),
        ("messages", pa.string()),
    ]
)
"""One line per sequence; the sequences of a row are adjacent."""


class Line(NamedTuple):
    """One line of the table; the fields are the columns of SCHEMA."""

    input_ids: Ids
    labels: Ids
    number: int
    """Number of the row or line in its file."""
    digest: int
    """Hash of the row's messages and tools."""
    asked: int
    """Hash of the same without the last answer."""
    flags: int
    tokens: int
    trained: int
    """Number of labelled tokens."""
    lost: int
    """Number of tokens that truncation removed from the row."""
    messages: str
    """JSON; present only in the first sequence of a row."""


class EncodedRows:
    """The encoded rows of a cache entry, memory-mapped.

    Args:
        folder: the entry.

    Raises:
        OSError, ValueError, TypeError, KeyError: the entry is damaged (pyarrow and json raise errors of these types).
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ROWS
        info = json.loads((folder / INFO).read_text(encoding="utf-8"))
        self.log = ReadingLog(**info["reading"])
        with pa.memory_map(str(self.path)) as mapped:
            self.table: pa.Table = pa.ipc.open_stream(mapped).read_all()
        if len(self.table) != info["sequences"]:
            raise ValueError(f"{self.path}: {len(self.table)} of {counted(info['sequences'], 'sequence')} there")

    def __len__(self) -> int:
        return len(self.starts)

    @cached_property
    def sequence_numbers(self) -> NDArray[np.int64]:
        """Row number in the file, per sequence."""
        return self._column("number")

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Index of the first sequence, per row."""
        numbers = self.sequence_numbers
        return np.flatnonzero(np.r_[len(numbers) > 0, numbers[1:] != numbers[:-1]][: len(numbers)])

    @cached_property
    def tokens(self) -> NDArray[np.int32]:
        """Number of tokens, per sequence."""
        return self._column("tokens")

    @cached_property
    def trained(self) -> NDArray[np.int32]:
        """Number of labelled tokens, per sequence."""
        return self._column("trained")

    @cached_property
    def numbers(self) -> NDArray[np.int64]:
        """Number in the file, per row."""
        return self.sequence_numbers[self.starts]

    @cached_property
    def digests(self) -> NDArray[np.uint64]:
        """Hash of messages and tools, per row."""
        return self._of_rows("digest")

    @cached_property
    def asked(self) -> NDArray[np.uint64]:
        """Hash of what precedes the last answer, and of the tools, per row."""
        return self._of_rows("asked")

    @cached_property
    def flags(self) -> NDArray[np.int32]:
        """Bits of the findings, per row."""
        return self._of_rows("flags")

    @cached_property
    def lost(self) -> NDArray[np.int32]:
        """Number of tokens removed by truncation, per row."""
        return self._of_rows("lost")

    @cached_property
    def longest(self) -> NDArray[np.int32]:
        """Number of tokens of the longest sequence, per row."""
        return np.maximum.reduceat(self.tokens, self.starts) if len(self) else self.tokens

    @cached_property
    def trained_of_rows(self) -> NDArray[np.int64]:
        """Number of labelled tokens, per row."""
        return np.add.reduceat(self.trained, self.starts, dtype=np.int64) if len(self) else np.zeros(0, np.int64)

    def messages(self, row: int) -> list[dict[str, Any]]:
        """Return the conversation of a row, by its index in this object."""
        found: list[dict[str, Any]] = json.loads(self.table.column("messages")[int(self.starts[row])].as_py())
        return found

    def input_ids(self, row: int) -> NDArray[np.int32]:
        """Return the ids of a row's first sequence."""
        return _as_numpy(self.table.column("input_ids")[int(self.starts[row])].values)

    def prompt_ids(self, row: int) -> NDArray[np.int32]:
        """Return the ids of a row's first sequence that precede its first label."""
        labels = _as_numpy(self.table.column("labels")[int(self.starts[row])].values)
        return self.input_ids(row)[: int(np.argmax(labels >= 0))] if len(labels) else labels

    def _of_rows(self, name: str) -> NDArray[Any]:
        return self._column(name)[self.starts]

    def _column(self, name: str) -> NDArray[Any]:
        chunks = [_as_numpy(chunk) for chunk in self.table.column(name).chunks]
        return np.concatenate(chunks) if chunks else np.zeros(0, str(SCHEMA.field(name).type))


def _as_numpy(array: pa.Array) -> NDArray[Any]:
    """View an array without nulls as numpy; pyarrow's own conversion imports pandas, which takes seconds."""
    values = np.frombuffer(array.buffers()[1] or b"", str(array.type))
    return values[array.offset : array.offset + len(array)]
