"""The output file of `infer --input`: stores results as they arrive, so that a rerun generates only the missing ones.

answers.jsonl.part          while running: a header line with the inputs, then one line per result
answers.jsonl               all rows in order, written in one step
answers.jsonl.report.json   inputs, counts and scores
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from loratune.errors import Exit, LoratuneError
from loratune.generation.batch.answer_header import (
    START_ANEW,
    About,
    check_same,
    header_of,
    header_values,
    is_header,
    parsed,
)
from loratune.plain_files import LONGEST_LINE, bounded_lines, is_folder, read_plain
from loratune.runs.folder import PROGRAM, file_sha256
from loratune.writing import disk_errors_explained, write_json, write_pieces

PART, REPORT = ".part", ".report.json"
ANSWER = ("answer", "reasoning", "tool_calls", "finish", "error", "tokens")
"""Fields of an answer."""
TOO_LONG = "too_long"
"""Finish reason of rows whose prompt does not fit into the context."""
REFUSED = "refused"
"""Finish reason of rows that are not valid prompts; `error` has the reason."""


def check_output(output: Path, input_name: str) -> None:
    """Reject output paths that cannot be written to.

    Raises:
        LoratuneError: the path is a folder, or would replace the input rows.
    """
    if output.name == "" or is_folder(output):
        raise LoratuneError(f"--output {output} is a folder; give a file, such as {output}/answers.jsonl", Exit.USAGE)
    places, rows = (output, _beside(output, PART), _beside(output, REPORT)), Path(input_name)
    with disk_errors_explained(output):
        replaces = rows.exists() and any(place.exists() and place.samefile(rows) for place in places)
    if replaces:
        raise LoratuneError(f"--output {output} would replace the rows of --input; choose another name", Exit.USAGE)
    if strange := [place for place in places if place.exists() and not place.is_file()]:
        raise LoratuneError(f"--output {output}: {strange[0]} is not a regular file; choose another name", Exit.USAGE)
    if not output.parent.is_dir():
        raise LoratuneError(f"--output {output}: there is no folder {output.parent}; make it first", Exit.USAGE)


def finished_report(output: Path, about: About) -> dict[str, Any] | None:
    """Return the report of a complete output file; None if there is work left.

    Raises:
        LoratuneError: the file has another content, or answers for other inputs.
    """
    if not output.exists():
        return None
    report = _read_json(_beside(output, REPORT))
    if report.get("program") != PROGRAM or report.get("sha256") != file_sha256(output):
        if header_of(_beside(output, PART)) == header_values(about):
            return None  # killed while finishing
        raise LoratuneError(
            f"{output} exists, but was not written by loratune or was changed since; replace it with --overwrite, "
            "or choose another file with --output",
            Exit.USAGE,
        )
    check_same(output, report.get("about"), about)
    return report


class AnswerFile:
    """Appends results as they arrive; created by `open_answers`.

    Args:
        output: final path of the answers.
        about: the inputs that determine the answers.
        part: the file of the results.
        handle: its file descriptor, open and locked.
    """

    def __init__(self, output: Path, about: About, part: Path, handle: int) -> None:
        self.output = output
        self.about = about
        self.part = part
        self._file = os.fdopen(handle, "r+b", buffering=0)
        self._places: dict[tuple[int, str], tuple[int, int]] = {}
        """Row and kind of a result → offset and length of its line."""
        self._end = 0
        self._is_taken_over = False

    def has(self, row: int, kind: str) -> bool:
        return (row, kind) in self._places

    def count(self, kind: str) -> int:
        return sum(1 for _, one in self._places if one == kind)

    def add(self, row: int, kind: str, values: dict[str, Any]) -> None:
        """Write a result; it has been passed to the operating system on return.

        Raises:
            LoratuneError: the result cannot be written.
        """
        line, start = json_line({"row": row, "kind": kind, **values}), self._end
        self._write(line)
        self._places[row, kind] = (start, len(line))

    def read(self, row: int, kind: str) -> dict[str, Any]:
        """Return a result without its row and kind; empty if there is none."""
        if (row, kind) not in self._places:
            return {}
        offset, length = self._places[row, kind]
        value: dict[str, Any] = json.loads(os.pread(self._file.fileno(), length, offset))
        return {name: inner for name, inner in value.items() if name not in ("row", "kind")}

    def take_finished(self) -> None:
        """Import the answers of a complete file, so that only additional results are generated."""
        with self.output.open("rb") as lines:
            for line in lines:
                row = parsed(line)
                for kind, values in (("answer", row), ("base answer", row.get("base"))):
                    if values:
                        self.add(row["row"], kind, {name: values[name] for name in ANSWER if name in values})

    def finish(self, rows: Iterable[dict[str, Any]], report: dict[str, Any]) -> None:
        """Write all rows under the final name in one step, and the report next to them.

        Args:
            rows: the rows in order.
            report: JSON values for the report.

        Raises:
            LoratuneError: a file cannot be written.
        """
        digest = hashlib.sha256()

        def lines() -> Iterator[bytes]:
            for row in rows:
                line = json_line(row)
                digest.update(line)
                yield line

        with disk_errors_explained(self.output):
            write_pieces(self.output, lines())
            known = {"program": PROGRAM, "about": self.about, "sha256": digest.hexdigest()}
            write_json(_beside(self.output, REPORT), {**known, **report})
            self.part.unlink()

    def take_over(self, overwrite: bool) -> None:
        """Load the results of an earlier run, or start a new file.

        Args:
            overwrite: always start a new file.

        Raises:
            LoratuneError: the results belong to other inputs, or the file cannot be written.
        """
        header = json_line(header_values(self.about))
        if overwrite:
            # Without its report, the old file no longer counts as complete, and the new one can be resumed.
            _beside(self.output, REPORT).unlink(missing_ok=True)
            self._begin(header)
            self._is_taken_over = True
            return
        with os.fdopen(os.dup(self._file.fileno()), "rb") as lines:
            self._take_in(lines, header)
        self._is_taken_over = True

    def close(self) -> None:
        """Close the .part file; delete it if it has no results."""
        if self._is_taken_over and not self._places:
            self.part.unlink(missing_ok=True)
        self._file.close()

    def _take_in(self, lines: BinaryIO, header: bytes) -> None:
        first = lines.readline(LONGEST_LINE)
        # A first line without a line break was interrupted while being written.
        if not first or (not first.endswith(b"\n") and header.startswith(first)):
            self._begin(header)
            return
        known = parsed(first)
        if not is_header(known):
            raise LoratuneError(
                f"{self.part} was not written by loratune or was changed since; {START_ANEW}", Exit.USAGE
            )
        check_same(self.part, known.get("about"), self.about)
        self._end = len(first)
        for line in bounded_lines(lines):
            value = parsed(line)
            if not line.endswith(b"\n") or not isinstance(value.get("row"), int) or "kind" not in value:
                break
            self._places[value["row"], str(value["kind"])] = (self._end, len(line))
            self._end += len(line)
        self._file.truncate(self._end)  # an incomplete line of an interrupted process
        self._file.seek(self._end)

    def _begin(self, header: bytes) -> None:
        self._file.truncate(0)
        self._file.seek(0)
        self._write(header)

    def _write(self, line: bytes) -> None:
        with disk_errors_explained(self.part):
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
        self._end += len(line)


@contextmanager
def open_answers(output: Path, about: About, overwrite: bool, part: Path | None = None) -> Iterator[AnswerFile]:
    """Open the file of the results exclusively, with those of an earlier run; None is the .part file of `output`.

    Raises:
        LoratuneError: another process writes it, it belongs to other inputs, or it cannot be written.
    """
    part = part or _beside(output, PART)
    with disk_errors_explained(part):
        handle = _locked(part)
    file = AnswerFile(output, about, part, handle)
    try:
        file.take_over(overwrite)
        yield file
    finally:
        file.close()


def json_line(value: Any) -> bytes:
    """Encode a JSON value as one line; values without a JSON type, such as dates from Parquet, become strings."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:  # an unpaired surrogate, which only an escape can represent
        return json.dumps(value, default=str).encode() + b"\n"


def _beside(output: Path, ending: str) -> Path:
    return output.with_name(output.name + ending)


def _locked(part: Path) -> int:
    while True:
        handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise LoratuneError(
                f"{part} is being written by another process; wait for it, or choose another place with --output",
                Exit.USAGE,
            ) from error
        # The previous holder of the lock may have finished and removed the file that is open here.
        if part.exists() and os.path.samestat(os.fstat(handle), part.stat()):
            return handle
        os.close(handle)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return parsed(read_plain(path))
    except OSError:
        return {}
