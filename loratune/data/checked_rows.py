"""The rows of a file as conversations, one after another, and what was wrong with the others."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from loratune.data.formats.columns import describe_unread_columns
from loratune.data.formats.conversation import Conversation
from loratune.data.formats.registry import FORMATS, ConversationReader, detect_format
from loratune.data.reading.files import BadRow, Row, RowFile
from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.recipe.data_sections import DataSettings

FORMAT_ROWS = 1000
"""Rows among which the first in a known format decides the file's."""
SHOWN_ROWS = 5


@dataclass
class ReadingLog:
    """What was seen while the rows of a file were read."""

    format: str
    seen: int = 0
    good: int = 0
    """Rows that can be trained on, of which some may not have been asked for."""
    refused: int = 0
    """Of the bad rows, those that the chat template refuses."""
    rendered: int = 0
    """Rows that it has rendered."""
    first_bad: list[tuple[int, str]] = field(default_factory=list)
    """Of the first bad rows, number and what is wrong and where, without the file's name: others may read the same."""
    ignored: list[str] = field(default_factory=list)
    """Keys that say nothing to the format; some of them if there are very many."""
    under: str = ""
    """Key of the object that holds the rows, where they are no document of their own."""

    @property
    def bad(self) -> int:
        """Rows that cannot be read or trained on."""
        return self.seen - self.good

    def note(self, number: int, problem: str) -> None:
        """Keep what is wrong with a row if it is one of the first; rows may come in any order."""
        insort(self.first_bad, (number, problem))
        del self.first_bad[SHOWN_ROWS:]


class CheckedRows:
    """The conversations of a file with the numbers of their rows; `log` tells of the last time through.

    Args:
        file: where they come from.
        reader: of their format.
        chosen: numbers of the rows to take; None takes all.
    """

    def __init__(self, file: RowFile, reader: ConversationReader, chosen: frozenset[int] | None = None) -> None:
        self.file, self.reader, self.chosen = file, reader, chosen
        self.log = ReadingLog(reader.kind.name)

    def __iter__(self) -> Iterator[tuple[int, Conversation]]:
        """Go through the file; bad rows are noted and left out.

        Raises:
            LoratuneError: placeholders without a value, or a file that holds no rows at all.
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
        self.reader.check_placeholders()

    def refuse(self, number: int, error: LoratuneError) -> None:
        """Count a row that was handed out as bad, since it cannot be rendered."""
        self.log.good -= 1
        self.log.refused += error.exit_code == Exit.MODEL
        self.log.note(number, f"{self.file.place(number)}: {error}".removeprefix(self.file.name))

    def _read(self, row: Row) -> Conversation | str:
        read = self.reader.read(row.value)
        return f"{self.file.place(row.number)}: {read}" if isinstance(read, str) else read


def check_rows(file: RowFile, data: DataSettings, system: str | None = None) -> CheckedRows:
    """The rows of an opened file, in the format of its first ones."""
    first = [row.value for row in islice(file, FORMAT_ROWS) if not isinstance(row, BadRow)]
    kind = detect_format(first, data.columns)
    unread = describe_unread_columns(first, kind, data.columns)
    if unread:
        raise LoratuneError(f"{file.name}: {unread}", Exit.DATA)
    return CheckedRows(file, ConversationReader(kind, data.placeholders, data.columns, system))


def judge_log(file: RowFile, log: ReadingLog, data: DataSettings) -> str:
    """What to say of rows that cannot be read or trained on; empty where there are none.

    Raises:
        LoratuneError: there are some and none may be left out, or too many, or nothing but bad ones; the template
            refuses all.
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
    message = f"{file.name}: {log.bad:,} of {log.seen:,} rows cannot be trained on:\n{listed}\n"
    if data.on_bad_row == "skip" and log.bad <= data.max_bad_rows and log.good:
        return f"{message}they are left out"
    needs = next(kind.needs for kind in FORMATS if kind.name == log.format) + "; " if log.refused < log.bad else ""
    if not log.good:
        reason = "no other row is left"
    elif data.on_bad_row == "skip":
        reason = f"data.max_bad_rows allows {data.max_bad_rows}"
    else:
        reason = "--data.on_bad_row skip leaves them out"
    raise LoratuneError(f"{message}{needs}mend or remove these rows ({reason})", Exit.DATA)
