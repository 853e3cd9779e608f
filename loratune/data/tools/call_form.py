"""The form in which a model writes tool calls, and a streaming parser for answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from loratune.data.tools.call_shapes import BLANKS, Call, Schemas, Shape, flexible, schemas_of

LOOK = 200
"""Number of characters that are enough to recognise the opening of a call."""


@dataclass(frozen=True)
class CallForm:
    """The form of tool calls: `opening`, a call, then `closing`; or `between` and another call."""

    opening: str
    shape: Shape
    closing: str
    between: str = ""
    """Empty if several calls are each opened and closed, or the template writes only one."""
    marks: Mapping[str, str] = field(default_factory=dict)
    """Placeholder character → text of the special token that it stands for."""

    @cached_property
    def is_bare(self) -> bool:
        """Whether a call looks like an answer in JSON. It then has to be the whole answer and name an offered tool."""
        return not any(character.isalnum() or character in self.marks for character in self.opening)

    @cached_property
    def ends(self) -> frozenset[str]:
        """Characters at least one of which completes a call."""
        return frozenset(part.rstrip()[-1:] for part in (self.closing or self.shape.ends_with, self.between) if part)

    def find(self, text: str, start: int = 0) -> int:
        """Return the first index where a call starts, or could start if the text continues; else the text's length."""
        place = text.find(self._head[0], start)
        while place >= 0 and not self.may_begin(text, place):
            place = text.find(self._head[0], place + 1)
        return len(text) if place < 0 else place

    def may_begin(self, text: str, place: int = 0) -> bool:
        """Return whether a call starts at an index, or could do so if the text continues."""
        return self._head.startswith("".join(text[place : place + LOOK].split())[: len(self._head)])

    def read(self, text: str, start: int, schemas: Schemas, most: int | None = None) -> tuple[list[Call], int] | None:
        """Parse the calls that start at an index of a text.

        The result does not change when text is appended.

        Args:
            text: an answer, with special tokens replaced by placeholders.
            start: the index.
            schemas: schemas of the offered tools.
            most: stop after this many calls.

        Returns:
            The calls and their end; None if there is no complete call.
        """
        calls: list[Call] = []
        place = flexible(self.opening, "", BLANKS).match(text, start)
        while place and (read := self.shape.read(text, place.end(), schemas)):
            calls.append(read[0])
            if end := flexible(self.closing, BLANKS, "").match(text, read[1]):
                return calls, end.end()
            place = flexible(self.between, BLANKS, BLANKS).match(text, read[1]) if self.between else None
            if place and len(calls) == most:
                return calls, place.end()
        return None

    def in_words(self, text: str) -> str:
        """Return a part of the form with special tokens restored and whitespace removed."""
        return "".join("".join(self.marks.get(character, character) for character in text).split())

    @cached_property
    def _head(self) -> str:
        """The first characters of a call without whitespace; empty only if the form is bare."""
        return "".join(self.opening.split()) + self.shape.begins_with


class Told(NamedTuple):
    """Text and tool calls of a part of an answer."""

    text: str
    calls: tuple[Call, ...]


class CallStream:
    """Separates tool calls from the text of a streamed answer; the result does not depend on how the stream is split.

    Incomplete calls stay text. Whitespace around calls is dropped.

    Args:
        form: form of the calls.
        tools: the offered tools.
        most: the answer is done after this many calls.
    """

    def __init__(self, form: CallForm, tools: Sequence[Mapping[str, Any]], most: int | None = None) -> None:
        self._form, self._schemas, self._most = form, schemas_of(tools), most
        self._unmark = str.maketrans(dict.fromkeys(form.marks))
        self._held = ""
        """Text that may belong to a call."""
        self._blank = ""
        """Whitespace that is emitted only if text follows."""
        self._has_said = self._has_called = False
        self._is_behind_call = False
        self.is_done = False
        """Whether the maximum number of calls is reached; later text is ignored."""

    def push(self, text: str, is_last: bool = False) -> Told:
        """Add text, and return the text and calls that are now certain."""
        if self.is_done:
            return Told("", ())
        self._held += text
        said, calls = "", list[Call]()
        can_be_whole = is_last or not self._form.ends.isdisjoint(text)
        while self._held and not self.is_done:
            start = self._next_start()
            said += self._said(self._held[:start])
            self._held = self._held[start:]
            read = self._read(is_last) if self._held and can_be_whole else None
            if read:
                calls += read[0]
                self._called(*read)
            elif self._held and is_last:  # not a call after all
                said += self._said(self._held[:1])
                self._held = self._held[1:]
            else:
                break
        if is_last and not self._is_behind_call:
            said, self._blank = said + self._blank, ""
        return Told(said, tuple(calls))

    def _next_start(self) -> int:
        """Return the index in the held text where a call may start."""
        if not self._form.is_bare:
            return self._form.find(self._held)
        if self._has_said or self._has_called:
            return len(self._held)
        words = self._held.lstrip()
        return len(self._held) - len(words) if self._form.may_begin(words) else len(self._held)

    def _read(self, is_last: bool) -> tuple[list[Call], int] | None:
        """Parse calls at the start of the held text; a bare call counts only if it is the whole answer."""
        if not self._form.is_bare:
            return self._form.read(self._held, 0, self._schemas, self._most)
        read = self._form.read(self._held, 0, self._schemas) if is_last else None
        is_alone = read and not self._held[read[1] :].strip() and all(call.name in self._schemas for call in read[0])
        return read if is_alone else None

    def _called(self, calls: list[Call], end: int) -> None:
        self._held, self._blank = self._held[end:], ""
        self._has_called = self._is_behind_call = True
        if self._most is not None:
            self._most -= len(calls)
            self.is_done = self._most <= 0

    def _said(self, text: str) -> str:
        """Return text that is not part of a call, with the whitespace before it; trailing whitespace is held back."""
        text = self._blank + text.translate(self._unmark)
        words = text.rstrip()
        self._blank = text[len(words) :]
        if not words:
            return ""
        if self._has_called and not self._has_said:
            words = words.lstrip()
        self._has_said, self._is_behind_call = True, False
        return words
