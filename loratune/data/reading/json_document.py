"""Text of a document `[row, row, …]` → its rows, one at a time, with the errors that the whole text would give."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from loratune.data.reading.json_words import DECODER, EXCERPT, explain_fault
from loratune.data.reading.rows import ROW_CAP, TOO_LONG, Row
from loratune.errors import Exit, LoratuneError

BLANKS = re.compile(r"[ \t\n\r]*")
SEPARATOR = re.compile(r"[ \t\n\r]*,?[ \t\n\r]*")
NEAR_END = 64
"""Characters: a fault this close to the end of what is read may only be that the rest is not read yet.
More than any escape, literal or excerpt needs."""
CLOSED = object()


def rows_of_document(name: str, pieces: Iterator[str]) -> Iterator[Row]:
    """The rows of a list, numbered from 1.

    Args:
        name: of the file, for errors.
        pieces: its text; only as much as one row needs is held.

    Raises:
        LoratuneError: not a list, no rows, or not JSON; with line and column.
    """
    window = _Window(pieces)
    start = window.skip_blanks()
    if not start:
        raise LoratuneError(f"{name}: 0 rows, the file is empty", Exit.DATA)
    if start != "[":
        _refuse_other_document(name, window)
    window.position += 1
    number = 1
    while (value := _next_value(name, window, number)) is not CLOSED:
        yield Row(value, number)
        number += 1
    if window.skip_blanks():
        raise _fault(name, window, "[]")
    if number == 1:
        raise LoratuneError(f"{name}: 0 rows", Exit.DATA)


class _Window:
    """The part of a text that is being parsed, and how many lines and columns lie before it."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self.pieces = pieces
        self.text = ""
        self.position = 0
        """What lies before it is done with."""
        self.ended = False
        self.lines = 0
        self.columns = 0

    def grow(self) -> None:
        """Forget what is done with; read as much again as is left, so that a long row is not parsed too often."""
        wanted = max(1, len(self.text) - self.position)
        fresh: list[str] = []
        while wanted > 0 and not self.ended:
            piece = next(self.pieces, None)
            self.ended = piece is None
            fresh.append(piece or "")
            wanted -= len(fresh[-1])
        cut = max(0, self.position - EXCERPT)
        line, column = self.place(cut)
        self.lines, self.columns = line - 1, column - 1
        self.text = self.text[cut:] + "".join(fresh)
        self.position -= cut

    def skip_blanks(self) -> str:
        """Go to the next character that is not blank, and return it; at the end there is none."""
        while True:
            match = BLANKS.match(self.text, self.position)
            self.position = match.end() if match else self.position
            if self.ended or self.position < len(self.text):
                return self.text[self.position : self.position + 1]
            self.grow()

    def place(self, index: int) -> tuple[int, int]:
        """Line and column, from 1, of an index into the text."""
        newlines = self.text.count("\n", 0, index)
        column = index - self.text.rfind("\n", 0, index) if newlines else self.columns + index + 1
        return self.lines + newlines + 1, column


def _next_value(name: str, window: _Window, number: int) -> Any:
    """The next row, or CLOSED."""
    while True:
        try:
            value, end = _parse_next(window.text, window.position, is_first=number == 1)
            # A number at the end of what is read may go on with .5 or e+5.
            if window.ended or end + 3 <= len(window.text):
                window.position = end
                return value
        except json.JSONDecodeError as error:
            if window.ended or not _may_go_on(error, window.text):
                raise _fault(name, window, "[" if number == 1 else "[null") from error
        except (ValueError, RecursionError) as error:
            # Of a number with too many digits, what follows may make a fraction.
            if window.ended or isinstance(error, RecursionError) or not window.text[-1].isdigit():
                raise LoratuneError(_explain_at_row(name, window, error), Exit.DATA) from error
        if len(window.text) - window.position > ROW_CAP:
            line, _ = window.place(_row_start(window))
            raise LoratuneError(f"{name}:{line}: row {number} is {TOO_LONG}", Exit.DATA)
        window.grow()


def _parse_next(text: str, position: int, is_first: bool) -> tuple[Any, int]:
    """The value after a comma or the opening bracket, and where it ends."""
    index = _after_blanks(text, position)
    char = text[index : index + 1]
    if char == "]":
        return CLOSED, index + 1
    if not is_first:
        if char != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, index)
        index = _after_blanks(text, index + 1)
    return DECODER.raw_decode(text, index)


def _after_blanks(text: str, position: int) -> int:
    match = BLANKS.match(text, position)
    return match.end() if match else position


def _may_go_on(error: json.JSONDecodeError, text: str) -> bool:
    """Whether a fault may be gone once more is read."""
    return error.pos > len(text) - NEAR_END or error.msg.startswith("Unterminated string")


def _fault(name: str, window: _Window, before: str) -> LoratuneError:
    """What the decoder says of a list that goes on as the text does; versions of Python differ in words and places.

    Args:
        name: of the file.
        window: at the end of the last value.
        before: a stand-in for all that lies before; not a number, which could go on with the text.
    """
    while not window.ended and len(window.text) - window.position < NEAR_END:
        window.grow()
    return _whole_fault(name, window, before) or LoratuneError(f"{name}: not valid JSON", Exit.DATA)


def _whole_fault(name: str, window: _Window, before: str = "") -> LoratuneError | None:
    try:
        DECODER.decode(before + window.text[window.position :])
    except json.JSONDecodeError as error:
        index = window.position + error.pos - len(before)
        return LoratuneError(explain_fault(name, error, window.place(index), window.text, index), Exit.DATA)
    except (ValueError, RecursionError) as error:
        return LoratuneError(_explain_at_row(name, window, error), Exit.DATA)
    return None


def _explain_at_row(name: str, window: _Window, error: Exception) -> str:
    start = _row_start(window)
    return explain_fault(name, error, window.place(start), window.text, start)


def _row_start(window: _Window) -> int:
    match = SEPARATOR.match(window.text, window.position)
    return match.end() if match else window.position


def _refuse_other_document(name: str, window: _Window) -> NoReturn:
    """Say what a document that is no list is; one that is too large to be read whole is told by its beginning."""
    while not window.ended and len(window.text) <= ROW_CAP:
        window.grow()
    is_object = window.text[window.position] == "{"
    fault = _whole_fault(name, window) if window.ended or not is_object else None
    if fault:
        raise fault
    value = json.loads(window.text[window.position :]) if window.ended else {}
    if not isinstance(value, dict):
        raise LoratuneError(f"{name}: holds {type(value).__name__} where a list of rows is expected", Exit.DATA)
    lists = [key for key, inner in value.items() if isinstance(inner, list)]
    hint = f"; its rows seem to be under {lists[0]!r}: save that list alone" if lists else ""
    raise LoratuneError(f"{name}: holds one object where a list of rows is expected{hint}", Exit.DATA)
