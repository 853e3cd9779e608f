"""The raw rows that all readers yield."""

from __future__ import annotations

from typing import Any, NamedTuple

ROW_CAP = 64 << 20
"""Maximum length of a row or line in characters; bounds the memory that a broken file can take."""
TOO_LONG = f"longer than {ROW_CAP} characters, too long for a row"


class Row(NamedTuple):
    """A raw row and its place."""

    value: Any
    number: int
    """Line number in files of lines, otherwise the index of the row; from 1."""
    under: str = ""
    """Key of the list that holds the rows, if they are nested in an object."""


class BadRow(NamedTuple):
    """A row that cannot be read."""

    number: int
    problem: str
    """A full sentence with file and line."""
