"""Parses CSV with a header; all values are strings."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from itertools import chain

from loratune.data.reading.json_lines import split_lines
from loratune.data.reading.rows import ROW_CAP, TOO_LONG, BadRow, Row
from loratune.errors import Exit, LoratuneError, counted

DELIMITERS = (",", ";", "\t")
NAMES = {",": "a comma", ";": "a semicolon", "\t": "a tab"}
QUOTED = re.compile('"[^"]*"')


def rows_of_csv(name: str, pieces: Iterator[str]) -> Iterator[Row | BadRow]:
    """Yield the records of a file, numbered by the line on which each starts.

    Raises:
        LoratuneError: there are no rows, or the header does not name the columns.
    """
    csv.field_size_limit(ROW_CAP)  # the default of 128 KiB is shorter than a long conversation
    lines = _lines(name, pieces)
    blank_lines, first = 0, next(lines, "")
    while first.isspace():
        blank_lines, first = blank_lines + 1, next(lines, "")
    if not first:
        raise LoratuneError(f"{name}: 0 rows, the file is empty", Exit.DATA)
    delimiter = _delimiter(first)
    reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    header = _header(name, reader, blank_lines + 1)
    has_rows = False
    while True:
        number = blank_lines + reader.line_num + 1
        try:
            record = next(reader, None)
        except csv.Error as error:
            has_rows = True
            yield BadRow(number, f"{name}:{number}: not valid CSV: {error}")
            continue
        if record is None:
            break
        if len(record) == len(header):
            has_rows = True
            yield Row(dict(zip(header, record, strict=True)), number)
        elif any(field.strip() for field in record) or len(record) > 1:
            has_rows = True
            yield BadRow(number, f"{name}:{number}: {_miscount(record, header, delimiter)}")
    if not has_rows:
        raise LoratuneError(f"{name}: 0 rows, only a header", Exit.DATA)


def _lines(name: str, pieces: Iterator[str]) -> Iterator[str]:
    for number, line in split_lines(pieces):
        if line is None:
            raise LoratuneError(f"{name}:{number}: {TOO_LONG}", Exit.DATA)
        yield line + "\n"


def _delimiter(header: str) -> str:
    """Return the most frequent delimiter of the header; a comma if there is none."""
    unquoted = QUOTED.sub("", header)
    return max(DELIMITERS, key=unquoted.count)


def _header(name: str, reader: Iterator[list[str]], number: int) -> list[str]:
    try:
        header = [column.strip() for column in next(reader)]
    except csv.Error as error:
        raise LoratuneError(
            f"{name}:{number}: not valid CSV: {error}; save it as CSV UTF-8 again", Exit.DATA
        ) from error
    unnamed = [str(place) for place, column in enumerate(header, start=1) if not column]
    if unnamed:
        raise LoratuneError(
            f"{name}:{number}: the header has no name for column {', '.join(unnamed)}; name or remove it", Exit.DATA
        )
    repeated = sorted({column for column in header if header.count(column) > 1})
    if repeated:
        raise LoratuneError(
            f"{name}:{number}: the header names {', '.join(map(repr, repeated))} more than once; rename or remove one",
            Exit.DATA,
        )
    return header


def _miscount(record: list[str], header: list[str], delimiter: str) -> str:
    return (
        f"{counted(len(record), 'field')} where the header has {len(header)}; "
        f"put texts that contain {NAMES[delimiter]} or a line end in double quotes"
    )
