"""Follows the metrics of runs that are shown again and again: only what was appended is read."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

from loratune.plain_files import LONGEST_LINE, bounded_lines, open_plain
from loratune.runs.folder import METRICS, records_of

MOST_RUNS = 32
"""Whose records are kept, those that were read last."""
COMPARED_BYTES = 64
"""Before what was appended; they tell whether it is still the same file."""


class FollowedMetrics:
    """Reads the metrics of runs; one object may be used by several threads."""

    def __init__(self) -> None:
        self._runs: OrderedDict[Path, _Followed] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, output: Path) -> list[dict[str, float]]:
        """Return what `read_metrics` does.

        Raises:
            OSError: the file cannot be read.
        """
        with self._lock:
            run = self._runs.setdefault(output, _Followed(output / METRICS))
            self._runs.move_to_end(output)
            while len(self._runs) > MOST_RUNS:
                self._runs.popitem(last=False)
            return run.read()


class _Followed:
    """The records of one file, as far as its lines are complete."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._forget()

    def _forget(self) -> None:
        self._file: tuple[int, int] | None = None
        """Device and inode."""
        self._size = 0
        self._end = b""
        """The last bytes that were read."""
        self._records: list[dict[str, float]] = []

    def read(self) -> list[dict[str, float]]:
        if not self._path.is_file():
            self._forget()
            return []
        with open_plain(self._path) as lines:
            self._start(lines)
            return self._records + self._appended(lines)

    def _start(self, lines: BinaryIO) -> None:
        """Move to what was appended; to the beginning of a file that was replaced, shortened or written again."""
        status = os.fstat(lines.fileno())
        file = (status.st_dev, status.st_ino)
        lines.seek(self._size - len(self._end))
        if file != self._file or lines.read(len(self._end)) != self._end:
            self._forget()
            self._file = file
            lines.seek(0)

    def _appended(self, lines: BinaryIO) -> list[dict[str, float]]:
        """Keep the records of complete lines; return that of a last one whose end is still to come, if it has one."""
        for line in bounded_lines(lines):
            if not line.endswith(b"\n") and len(line) < LONGEST_LINE:
                return records_of([line])
            self._size += len(line)
            self._end = (self._end + line)[-COMPARED_BYTES:]
            self._records += records_of([line])
        return []
