"""Reads a file's rows as conversations, and records what is wrong with the rest."""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice

from loratune.data.formats.columns import describe_unread_columns
from loratune.data.formats.conversation import Conversation
from loratune.data.formats.placeholders import describe_unfilled
from loratune.data.formats.registry import FORMATS, ConversationReader, detect_format
from loratune.data.reading.files import BadRow, Row, RowFile
from loratune.errors import Exit, LoratuneError, bullet_list, counted
from loratune.recipe.data_sections import DataSettings

FORMAT_ROWS = 1000
"""The file's format is that of the first recognised row among this many."""
SHOWN_ROWS = 5


@dataclass
class ReadingLog:
    """Counts and problems from one pass over a file."""

    format: str
    seen: int = 0
    good: int = 0
    """Valid rows, including those that `chosen` leaves out."""
    refused: int = 0
    """Bad rows that the chat template rejected."""
    rendered: int = 0
    """Rows that the chat template rendered."""
    first_bad: list[tuple[int, str]] = field(default_factory=list)
    """Row numbers and problems of the first bad rows, without the file's name: a cached log may serve another path."""
    ignored: list[str] = field(default_factory=list)
    """Keys that the format does not use; at most ten."""
    unfilled: list[str] = field(default_factory=list)
    """Required placeholders without a value."""
    literal: list[str] = field(default_factory=list)
    """Other placeholders without a value."""
    filled: list[str] = field(default_factory=list)
    """Placeholders with a value, in small letters."""
    under: str = ""
    """Key of the list that holds the rows, if they are nested in an object."""

    @property
    def bad(self) -> int:
        """Number of rows that cannot be read or trained on."""
        return self.seen - self.good

    def note(self, number: int, problem: str) -> None:
        """Record a row's problem if it is among the first; rows may arrive in any order."""
        insort(self.first_bad, (number, problem))
        del self.first_bad[SHOWN_ROWS:]


class CheckedRows:
    """The conversations of a file, with their row numbers. `log` describes the last iteration.

    Args:
        file: the file to read.
        reader: converts rows of the file's format.
        chosen: row numbers to yield; None yields all.
    """

    def __init__(self, file: RowFile, reader: ConversationReader, chosen: frozenset[int] | None = None) -> None:
        self.file, self.reader, self.chosen = file, reader, chosen
        self.log = ReadingLog(reader.kind.name)

    def __iter__(self) -> Iterator[tuple[int, Conversation]]:
        """Yield row numbers and conversations; bad rows are logged and skipped.

        Raises:
            LoratuneError: a file without any rows, or one that is damaged.
        """
        log = self.log = ReadingLog(self.reader.kind.name)
        for row in self.file:
            log.seen += 1
            read = row.problem if isinstance(row, BadRow) else self._read(row)
            if isinstance(read, str):
                log.note(row.number, read.removeprefix(self.file.name))
                continue
            log.good += 1
            log.under = row.under if isinstance(row, Row) else ""
            if self.chosen is None or row.number in self.chosen:
                yield row.number, read
        log.ignored = sorted(map(str, self.reader.ignored))[:10]
        fill = self.reader.fill
        log.unfilled, log.literal, log.filled = sorted(fill.missing), sorted(fill.literal), sorted(fill.used)

    def refuse(self, number: int, error: LoratuneError) -> None:
        """Count an already yielded row as bad because it cannot be rendered."""
        self.log.good -= 1
        self.log.refused += error.exit_code == Exit.MODEL
        self.log.note(number, f"{self.file.place(number)}: {error}".removeprefix(self.file.name))

    def _read(self, row: Row) -> Conversation | str:
        read = self.reader.read(row.value)
        return f"{self.file.place(row.number)}: {read}" if isinstance(read, str) else read


def check_rows(file: RowFile, data: DataSettings, system: str | None = None) -> CheckedRows:
    """Return the conversations of a file, in the format detected from its first rows."""
    first = [row.value for row in islice(file, FORMAT_ROWS) if not isinstance(row, BadRow)]
    kind = detect_format(first, data.columns)
    unread = describe_unread_columns(first, kind, data.columns)
    if unread:
        raise LoratuneError(f"{file.name}: {unread}", Exit.DATA)
    return CheckedRows(file, ConversationReader(kind, data.placeholders, data.columns, system))


def judge_log(file: RowFile, log: ReadingLog, data: DataSettings) -> str:
    """Return a warning about bad rows, or an empty string if there are none.

    Raises:
        LoratuneError: the recipe does not allow skipping this many rows, no good row is left, or the template rejects
            all.
    """
    if not log.bad:
        return ""
    listed = bullet_list([file.name + problem for _, problem in log.first_bad], limit=SHOWN_ROWS, total=log.bad)
    if log.refused and not log.rendered:
        raise LoratuneError(
            f"{file.name}: the tokenizer's chat template refuses every row that can be read:\n{listed}\n"
            "the template is at fault, or not made for such conversations; correct it, or set prompt.template to plain "
            "or alpaca",
            Exit.MODEL,
        )
    message = f"{file.name}: {log.bad:,} of {counted(log.seen, 'row')} cannot be trained on:\n{listed}\n"
    if data.on_bad_row == "skip" and log.bad <= data.max_bad_rows and log.good:
        return f"{message}they are left out"
    needs = next(kind.needs for kind in FORMATS if kind.name == log.format) + "; " if log.refused < log.bad else ""
    if not log.good:
        reason = "no other row is left"
    elif data.on_bad_row == "skip":
        reason = f"data.max_bad_rows allows {data.max_bad_rows}"
    else:
        reason = "--data.on_bad_row skip leaves them out"
    raise LoratuneError(f"{message}{needs}correct or remove these rows ({reason})", Exit.DATA)


def check_filled(file: RowFile, log: ReadingLog, given: Collection[str]) -> None:
    """Raise if rows hold a required placeholder without a value.

    Args:
        file: the file.
        log: of its rows.
        given: names that data.placeholders has a value for.

    Raises:
        LoratuneError: names the flags that would set it.
    """
    if log.unfilled:
        raise LoratuneError(f"{file.name}: {describe_unfilled(log.unfilled, given)}", Exit.DATA)
