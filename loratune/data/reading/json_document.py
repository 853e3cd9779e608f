"""Text of a document → its rows, one at a time, with the errors that the whole text would give.

A document is `[row, row, …]`, or an object that holds such a list under one key.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
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
PARTS_OF_A_ROW = ("messages", "conversations", "tools", "functions")
"""Lists of objects that a single row holds."""


def rows_of_document(name: str, pieces: Iterator[str]) -> Iterator[Row]:
    """The rows of a list, or of the one list of objects that an object holds, numbered from 1.

    Args:
        name: of the file, for errors.
        pieces: its text; only as much as one row needs is held.

    Raises:
        LoratuneError: no list of rows or several, no rows, or not JSON; with line and column.
    """
    window = _Window(pieces)
    start = window.skip_blanks()
    if not start:
        raise LoratuneError(f"{name}: 0 rows, the file is empty", Exit.DATA)
    if start not in "[{":
        _refuse_other_document(name, window)
    any_row = False
    for row in _rows_in_list(name, window) if start == "[" else _rows_in_object(name, window):
        any_row = True
        yield row
    if window.skip_blanks():
        raise _fault(name, window, "[]")
    if start == "[" and not any_row:
        raise LoratuneError(f"{name}: 0 rows", Exit.DATA)


def check_object(name: str, pieces: Iterator[str]) -> None:
    """Read an object that should hold a list of rows through, since a second list may stand behind the first.

    Args:
        name: of the file, for errors.
        pieces: its text; of any other document no more than the beginning is read.

    Raises:
        LoratuneError: what `rows_of_document` would find at any place of it.
    """
    begun = list(_until_text(pieces))
    if "".join(begun).lstrip(" \t\n\r").startswith("{"):
        deque(rows_of_document(name, chain(begun, pieces)), maxlen=0)


def _until_text(pieces: Iterator[str]) -> Iterator[str]:
    """Pieces up to the first that holds more than blanks."""
    for piece in pieces:
        yield piece
        if piece.strip():
            return


def _rows_in_list(name: str, window: _Window, key: str = "", before: str = "") -> Iterator[Row]:
    """The rows of the list that begins here; `before` is a stand-in for what it stands in."""
    window.position += 1
    number = 1
    while (value := _next_value(name, window, number, before)) is not CLOSED:
        yield Row(value, number, key)
        number += 1


def _rows_in_object(name: str, window: _Window) -> Iterator[Row]:
    """The rows of the object that begins here, which are told from its other values by being a list of objects."""
    window.position += 1
    names: dict[str, None] = {}
    found: list[str] = []
    while (key := _next_name(name, window, is_first=not names)) is not CLOSED:
        if key in names:
            line, _ = window.place(window.position)
            raise LoratuneError(f"{name}:{line}: the key {key!r} stands twice in the object", Exit.DATA)
        names[key] = None
        if not _begins_list_of_objects(window):
            _parse(name, window, DECODER.raw_decode, '{"":', f"the value of {key!r}")
            continue
        if key in PARTS_OF_A_ROW:
            raise LoratuneError(
                f"{name}: holds one object with {key!r} where a list of rows is expected; if it is a row, put it "
                "between [ and ]",
                Exit.DATA,
            )
        found.append(key)
        if len(found) > 1:
            raise LoratuneError(
                f"{name}: holds several lists of rows, {' and '.join(map(repr, found))}; save each as its own file",
                Exit.DATA,
            )
        yield from _rows_in_list(name, window, key, '{"":')
    if not found:
        keys = f" (its keys are {', '.join(map(repr, islice(names, 10)))})" if names else ""
        raise LoratuneError(f"{name}: holds one object where a list of rows is expected{keys}", Exit.DATA)


def _begins_list_of_objects(window: _Window) -> bool:
    """Whether a value that is about to be read is a list whose first entry is an object; nothing is read past."""
    window.skip_blanks()
    while (inner := _after_blanks(window.text, window.position + 1)) >= len(window.text):
        if window.ended or len(window.text) - window.position > ROW_CAP:
            break
        window.grow()
    return window.text[window.position : window.position + 1] == "[" and window.text[inner : inner + 1] == "{"


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


def _next_value(name: str, window: _Window, number: int, before: str) -> Any:
    """The next row, or CLOSED."""
    is_first = number == 1
    stand_in = before + ("[" if is_first else "[null")
    return _parse(name, window, partial(_parse_next, is_first=is_first), stand_in, f"row {number}")


def _next_name(name: str, window: _Window, is_first: bool) -> Any:
    """The key of an object's next value, or CLOSED."""
    stand_in = "{" if is_first else '{"":null'
    return _parse(name, window, partial(_parse_name, is_first=is_first), stand_in, "a key")


def _parse(name: str, window: _Window, parse: Callable[[str, int], tuple[Any, int]], before: str, what: str) -> Any:
    """What `parse` finds at the window's position, once as much is read as that needs.

    Args:
        name: of the file.
        window: left behind what was found.
        parse: text and position → value and end.
        before: as `_fault` takes it.
        what: is parsed, for an error.
    """
    while True:
        try:
            value, end = parse(window.text, window.position)
            # A number at the end of what is read may go on with .5 or e+5.
            if window.ended or end + 3 <= len(window.text):
                window.position = end
                return value
        except json.JSONDecodeError as error:
            if window.ended or not _may_go_on(error, window.text):
                raise _fault(name, window, before) from error
        except (ValueError, RecursionError) as error:
            # Of a number with too many digits, what follows may make a fraction.
            if window.ended or isinstance(error, RecursionError) or not window.text[-1].isdigit():
                raise LoratuneError(_explain_at_row(name, window, error), Exit.DATA) from error
        if len(window.text) - window.position > ROW_CAP:
            line, _ = window.place(_row_start(window))
            raise LoratuneError(f"{name}:{line}: {what} is {TOO_LONG}", Exit.DATA)
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


def _parse_name(text: str, position: int, is_first: bool) -> tuple[Any, int]:
    """The key after a comma or the opening brace, and where its colon ends."""
    index = _after_blanks(text, position)
    if text[index : index + 1] == "}":
        return CLOSED, index + 1
    if not is_first:
        if text[index : index + 1] != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, index)
        index = _after_blanks(text, index + 1)
    if text[index : index + 1] != '"':
        raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, index)
    key, end = DECODER.raw_decode(text, index)
    colon = _after_blanks(text, end)
    if text[colon : colon + 1] != ":":
        raise json.JSONDecodeError("Expecting ':' delimiter", text, colon)
    return key, colon + 1


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
    """Say what a document that is neither a list nor an object is."""
    while not window.ended and len(window.text) <= ROW_CAP:
        window.grow()
    fault = _whole_fault(name, window)
    if fault:
        raise fault
    value = json.loads(window.text[window.position :])
    raise LoratuneError(f"{name}: holds {type(value).__name__} where a list of rows is expected", Exit.DATA)
