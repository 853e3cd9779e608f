"""One raw row, as every reader hands it on."""

from __future__ import annotations

from typing import Any, NamedTuple

ROW_CAP = 64 << 20
"""Characters that one row or line may have; it bounds the memory that a broken file can take."""
TOO_LONG = f"longer than {ROW_CAP} characters, which is no row to train on"


class Row(NamedTuple):
    """One raw row and where it stands."""

    value: Any
    number: int
    """Of its line in a file of lines, else of the row; from 1."""
    under: str = ""
    """Key of the object that holds the rows, where they are no document of their own."""


class BadRow(NamedTuple):
    """A place where a row should stand and cannot be read."""

    number: int
    problem: str
    """A whole sentence, with file and line."""
