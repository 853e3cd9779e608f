"""Shows two answers side by side, line by line, while they are generated."""

from __future__ import annotations

import sys

from prompt_toolkit.utils import get_cwidth

from loratune import console
from loratune.engine.types import Delta
from loratune.generation.chat.screen import LineEnds
from loratune.printable import visible

_LEAST_COLUMN = 28
_SEPARATOR = " │ "
_WIDE = 2


class Columns:
    """Writes two answers side by side, line by line, as soon as both have a line.

    Args:
        titles: titles of the columns.
        width: width of the terminal in cells; if it is narrow, the answers are written one below the other. None for no
            terminal: one below the other, with lines of any length.
    """

    def __init__(self, titles: tuple[str, str], width: int | None) -> None:
        half = ((width or 0) - len(_SEPARATOR)) // 2
        self._titles = [visible(title) for title in titles]
        self._is_stacked = half < _LEAST_COLUMN
        self._columns = [Column((width or sys.maxsize) if self._is_stacked else half) for _ in titles]
        self._begun = 0
        """Number of titles written so far, when stacked."""
        if not self._is_stacked:
            left, right = (_cut(title, half) for title in self._titles)
            self._write_row((left, "title"), (right, "title"))
            self._write_row(("─" * half, "context"), ("─" * half, "context"), "─┼─")

    def show(self, place: int, piece: Delta) -> None:
        """Add to one answer, and write the lines that are complete."""
        column = self._columns[place]
        column.feed(piece.reasoning, "context")
        column.feed(piece.text, "plain")
        if piece.finish:
            column.end()
        self._write()

    def wait(self) -> None:
        """Do nothing; lines appear when they are complete."""

    def close(self) -> None:
        """Write the rest."""
        for column in self._columns:
            column.end()
        self._write()

    def _write(self) -> None:
        if self._is_stacked:
            self._write_stacked()
            return
        left, right = self._columns
        while (left.lines or left.is_ended) and (right.lines or right.is_ended) and (left.lines or right.lines):
            first, second = (column.lines.pop(0) if column.lines else ("", "plain") for column in (left, right))
            self._write_row(first, second)

    def _write_stacked(self) -> None:
        for place, (title, column) in enumerate(zip(self._titles, self._columns, strict=True)):
            if self._begun == place:
                console.write_spans([("\n" * bool(place) + title + "\n", "title")], brackets=False)
                self._begun += 1
            while column.lines:
                text, kind = column.lines.pop(0)
                console.write_spans([(text + "\n", kind)], brackets=False)
            if not column.is_ended:
                return

    def _write_row(self, left: tuple[str, str], right: tuple[str, str], separator: str = _SEPARATOR) -> None:
        gap = " " * (self._columns[0].width - get_cwidth(left[0]))
        console.write_spans([left, (gap + separator, "context"), (right[0] + "\n", right[1])], brackets=False)


class Column:
    """Streamed text, broken into lines of at most `width` cells."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.lines: list[tuple[str, str]] = []
        """Complete lines and their styles."""
        self.is_ended = False
        self._line_ends = LineEnds()
        self._rest = ""
        self._kind = ""

    def feed(self, text: str, kind: str) -> None:
        """Add text; a change of style starts a new line."""
        if not text:
            return
        if self._kind and self._kind != kind:
            self._flush()
            self.lines.append(("", "plain"))
        self._kind = kind
        self._rest += visible(self._line_ends.feed(text)).replace("\t", "    ")
        *whole, self._rest = self._rest.split("\n")
        for line in whole:
            self._fold(line, keeps_rest=False)
        self._rest = self._fold(self._rest, keeps_rest=True)

    def end(self) -> None:
        """End the text: what is left becomes the last line."""
        if not self.is_ended:
            self._flush()
        self.is_ended = True

    def _flush(self) -> None:
        self._rest += visible(self._line_ends.rest())
        if self._rest:
            self._fold(self._rest, keeps_rest=False)
        self._rest = ""

    def _fold(self, text: str, keeps_rest: bool) -> str:
        while get_cwidth(text) > self.width:
            line, text = break_line(text, self.width)
            self.lines.append((line, self._kind))
        if keeps_rest:
            return text
        self.lines.append((text, self._kind))
        return ""


def break_line(text: str, width: int) -> tuple[str, str]:
    """Split a text into the longest start that fits into `width` cells, and the rest.

    Lines break at spaces and next to wide characters, such as Chinese ones; a longer word is cut.
    """
    used, possible = 0, 0
    for place, character in enumerate(text):
        cells = get_cwidth(character)
        if place and (cells == _WIDE or get_cwidth(text[place - 1]) == _WIDE or character == " "):
            possible = place
        if used + cells > width:
            at = possible or max(place, 1)
            return text[:at].rstrip(" "), text[at:].removeprefix(" ")
        used += cells
    return text, ""


def _cut(text: str, width: int) -> str:
    return text if get_cwidth(text) <= width else break_line(text.replace(" ", "_"), width - 1)[0] + "…"
