"""Parses the rows of a JSON document one at a time, with the errors that parsing the whole text would give.

A document is `[row, row, …]`, or an object that has such a list under one key.
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
"""In characters; no escape or literal is longer. An error this close to the end of the buffer may need more text."""
CLOSED = object()
PARTS_OF_A_ROW = ("messages", "conversations", "tools", "functions")
"""Lists of objects that belong to a single row."""


def rows_of_document(name: str, pieces: Iterator[str]) -> Iterator[Row]:
    """Yield the rows of a list, or of an object's only list of objects, numbered from 1.

    Args:
        name: name of the file, for errors.
        pieces: text of the file; only as much as one row needs is kept in memory.

    Raises:
        LoratuneError: no list of rows or several, no rows, or invalid JSON (with line and column).
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
    """Parse a document completely if it is an object, because a second list could follow the first.

    Raises:
        LoratuneError: any error of `rows_of_document`.
    """
    begun = list(_until_text(pieces))
    if "".join(begun).lstrip(" \t\n\r").startswith("{"):
        deque(rows_of_document(name, chain(begun, pieces)), maxlen=0)


def _until_text(pieces: Iterator[str]) -> Iterator[str]:
    """Yield pieces up to the first that is not blank."""
    for piece in pieces:
        yield piece
        if piece.strip():
            return


def _rows_in_list(name: str, window: _Window, key: str = "", before: str = "") -> Iterator[Row]:
    """Yield the rows of the list at the current position; `before` stands for the text around it in errors."""
    window.position += 1
    number = 1
    while (value := _next_value(name, window, number, before)) is not CLOSED:
        yield Row(value, number, key)
        number += 1


def _rows_in_object(name: str, window: _Window) -> Iterator[Row]:
    """Yield the rows of the object at the current position; of its values, only the list of objects holds rows."""
    window.position += 1
    names: dict[str, None] = {}
    found: list[str] = []
    while (key := _next_name(name, window, is_first=not names)) is not CLOSED:
        if key in names:
            line, _ = window.place(window.position)
            raise LoratuneError(f"{name}:{line}: the key {key!r} occurs twice in the object", Exit.DATA)
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
    """Return whether the next value is a list whose first element is an object, without consuming it."""
    window.skip_blanks()
    while (inner := _after_blanks(window.text, window.position + 1)) >= len(window.text):
        if window.ended or len(window.text) - window.position > ROW_CAP:
            break
        window.grow()
    return window.text[window.position : window.position + 1] == "[" and window.text[inner : inner + 1] == "{"


class _Window:
    """The buffered part of a text, with the number of lines and columns before it."""

    def __init__(self, pieces: Iterator[str]) -> None:
        self.pieces = pieces
        self.text = ""
        self.position = 0
        """Text before this position has been consumed."""
        self.ended = False
        self.lines = 0
        self.columns = 0

    def grow(self) -> None:
        """Drop consumed text and read as much again as is left, so that a long row is not reparsed too often."""
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
        """Advance to the next non-blank character and return it; return an empty string at the end."""
        while True:
            match = BLANKS.match(self.text, self.position)
            self.position = match.end() if match else self.position
            if self.ended or self.position < len(self.text):
                return self.text[self.position : self.position + 1]
            self.grow()

    def place(self, index: int) -> tuple[int, int]:
        """Return line and column, from 1, of an index into the buffered text."""
        newlines = self.text.count("\n", 0, index)
        column = index - self.text.rfind("\n", 0, index) if newlines else self.columns + index + 1
        return self.lines + newlines + 1, column


def _next_value(name: str, window: _Window, number: int, before: str) -> Any:
    """Return the next row, or CLOSED."""
    is_first = number == 1
    stand_in = before + ("[" if is_first else "[null")
    return _parse(name, window, partial(_parse_next, is_first=is_first), stand_in, f"row {number}")


def _next_name(name: str, window: _Window, is_first: bool) -> Any:
    """Return the key of an object's next value, or CLOSED."""
    stand_in = "{" if is_first else '{"":null'
    return _parse(name, window, partial(_parse_name, is_first=is_first), stand_in, "a key")


def _parse(name: str, window: _Window, parse: Callable[[str, int], tuple[Any, int]], before: str, what: str) -> Any:
    """Parse at the window's position, reading more text for as long as the parser needs it.

    Args:
        name: name of the file.
        window: moved past the parsed value.
        parse: text and position → value and end.
        before: stand-in text, as for `_fault`.
        what: what is being parsed, for errors.
    """
    while True:
        try:
            value, end = parse(window.text, window.position)
            # A number at the end of the buffered text may continue with .5 or e+5.
            if window.ended or end + 3 <= len(window.text):
                window.position = end
                return value
        except json.JSONDecodeError as error:
            if window.ended or not _may_go_on(error, window.text):
                raise _fault(name, window, before) from error
        except (ValueError, RecursionError) as error:
            # An integer with too many digits may still turn out to be a fraction.
            if window.ended or isinstance(error, RecursionError) or not window.text[-1].isdigit():
                raise LoratuneError(_explain_at_row(name, window, error), Exit.DATA) from error
        if len(window.text) - window.position > ROW_CAP:
            line, _ = window.place(_row_start(window))
            raise LoratuneError(f"{name}:{line}: {what} is {TOO_LONG}", Exit.DATA)
        window.grow()


def _parse_next(text: str, position: int, is_first: bool) -> tuple[Any, int]:
    """Return the value after a comma or the opening bracket, and its end."""
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
    """Return the key after a comma or the opening brace, and the end of its colon."""
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
    """Return whether an error may disappear once more text is read."""
    return error.pos > len(text) - NEAR_END or error.msg.startswith("Unterminated string")


def _fault(name: str, window: _Window, before: str) -> LoratuneError:
    """Return the decoder's error, as if it had parsed the whole text; Python versions differ in messages and positions.

    Args:
        name: name of the file.
        window: positioned at the end of the last value.
        before: stands for the text before; not a number, which could continue into the text.
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
    """Raise an error for a document that is neither a list nor an object."""
    while not window.ended and len(window.text) <= ROW_CAP:
        window.grow()
    fault = _whole_fault(name, window)
    if fault:
        raise fault
    value = json.loads(window.text[window.position :])
    raise LoratuneError(f"{name}: holds {type(value).__name__} where a list of rows is expected", Exit.DATA)
