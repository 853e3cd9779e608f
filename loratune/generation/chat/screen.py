"""Displays streamed answers in the chat; control characters in them cannot affect the terminal."""

from __future__ import annotations

import time
from contextlib import ExitStack

from loratune import console
from loratune.engine.types import Delta
from loratune.printable import visible

_PATIENCE_SECONDS = 0.4


class LineEnds:
    """Converts `\\r\\n` in a stream to `\\n`, wherever the stream is split."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> str:
        """Add text and return it converted, except for a trailing `\\r`, which is held back."""
        text = self._held + text
        self._held = "\r" if text.endswith("\r") else ""
        return text.removesuffix(self._held).replace("\r\n", "\n")

    def rest(self) -> str:
        """Return the held back `\\r`, if any."""
        held, self._held = self._held, ""
        return held


class OneAnswer:
    """Writes an answer to stdout as it streams.

    Args:
        is_terminal: False omits reasoning and the waiting indicator.
    """

    def __init__(self, is_terminal: bool) -> None:
        self.is_terminal = is_terminal
        self._since = time.monotonic()
        self._spinner = ExitStack()
        self._line_ends = LineEnds()
        self._kind = ""
        self._last = "\n"

    def show(self, place: int, piece: Delta) -> None:
        if self.is_terminal:
            self._write(piece.reasoning, "context")
        self._write(piece.text, "plain")

    def wait(self) -> None:
        """Show a spinner until the first token."""
        if self.is_terminal and not self._kind and time.monotonic() > self._since + _PATIENCE_SECONDS:
            self._kind = "waiting"
            self._spinner.enter_context(console.status("reading the question"))

    def close(self) -> None:
        self._spinner.close()
        self._put(self._line_ends.rest())
        if self._last != "\n":
            console.write_result("")

    def _write(self, text: str, kind: str) -> None:
        if not text:
            return
        self._spinner.close()
        if self._kind == "context" != kind:
            self._put(self._line_ends.rest() + "\n" * (2 - (self._last == "\n")))
        self._kind = kind
        self._put(self._line_ends.feed(text))

    def _put(self, text: str) -> None:
        if not text:
            return
        shown = visible(text)
        if self._kind == "context":
            console.write_spans([(shown, "context")], brackets=False)
        else:
            console.write_result(shown, end="")
        self._last = shown[-1]
