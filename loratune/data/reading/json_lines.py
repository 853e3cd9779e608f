"""Splits text into lines, and parses one JSON row per line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain

from loratune.data.reading.json_words import DECODER, explain_fault
from loratune.data.reading.rows import ROW_CAP, TOO_LONG, BadRow, Row
from loratune.errors import Exit, LoratuneError


def split_lines(pieces: Iterator[str]) -> Iterator[tuple[int, str | None]]:
    """Yield line numbers and lines without their ends; None stands for a line that is too long to keep in memory.

    Only \\n ends a line: str.splitlines would also split at characters that JSON allows inside strings.
    """
    number, size = 1, 0
    held: list[str] = []
    for piece in pieces:
        *ended, rest = piece.split("\n")
        for part in ended:
            size += len(part)
            yield number, None if size > ROW_CAP else "".join([*held, part])
            number, held, size = number + 1, [], 0
        size += len(rest)
        held = [*held, rest] if size <= ROW_CAP else []
    if size:
        yield number, None if size > ROW_CAP else "".join(held)


def rows_of_lines(name: str, pieces: Iterator[str]) -> Iterator[Row | BadRow]:
    """Yield the row on every line that is not blank.

    Raises:
        LoratuneError: all lines are blank.
    """
    is_empty = True
    for number, line in split_lines(pieces):
        if line is None:
            yield BadRow(number, f"{name}:{number}: {TOO_LONG}")
        elif not line or line.isspace():
            continue
        else:
            yield _parse_line(name, line, number)
        is_empty = False
    if is_empty:
        raise LoratuneError(f"{name}: 0 rows, the file is empty", Exit.DATA)


def holds_lines(pieces: Iterator[str]) -> bool:
    """Return whether a .json file is in fact JSON Lines, which many tools write under that name."""
    start = next((text for piece in pieces if (text := piece.lstrip())), "")
    # Decided by the first character, so that a document on a single line is not taken for JSON Lines.
    if not start.startswith("{"):
        return False
    lines = (line for _, line in split_lines(chain([start], pieces)) if line is None or line.strip())
    first = next(lines, None)
    try:
        json.loads(first or "")
    except (ValueError, RecursionError):
        return False
    return next(lines, "") != ""


def _parse_line(name: str, line: str, number: int) -> Row | BadRow:
    try:
        return Row(DECODER.decode(line), number)
    except (ValueError, RecursionError) as error:
        index = error.pos if isinstance(error, json.JSONDecodeError) else 0
        return BadRow(number, explain_fault(name, error, (number, index + 1), line, index))
