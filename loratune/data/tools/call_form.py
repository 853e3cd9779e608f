"""Calls of tools in the text of an answer: the form in which a model writes them, and a reader of answers that come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from loratune.data.tools.call_shapes import BLANKS, Call, Schemas, Shape, flexible, schemas_of

LOOK = 200
"""Characters in which the opening of a call shows itself."""


@dataclass(frozen=True)
class CallForm:
    """Calls of tools in an answer: `opening`, a call, then `closing`; or `between` and another call."""

    opening: str
    shape: Shape
    closing: str
    between: str = ""
    """Empty where several calls are each opened and closed, or the template writes only one."""
    marks: Mapping[str, str] = field(default_factory=dict)
    """A character that stands for a special token → the token's text."""

    @cached_property
    def is_bare(self) -> bool:
        """Whether nothing tells a call from an answer in JSON. Then it must be all of the answer, and know its tool."""
        return not any(character.isalnum() or character in self.marks for character in self.opening)

    @cached_property
    def ends(self) -> frozenset[str]:
        """Characters without which no call becomes whole."""
        return frozenset(part.rstrip()[-1:] for part in (self.closing or self.shape.ends_with, self.between) if part)

    def find(self, text: str, start: int = 0) -> int:
        """The first place where a call begins or, at the end, may yet begin; the text's length if there is none."""
        place = text.find(self._head[0], start)
        while place >= 0 and not self.may_begin(text, place):
            place = text.find(self._head[0], place + 1)
        return len(text) if place < 0 else place

    def may_begin(self, text: str, place: int = 0) -> bool:
        """Whether a call begins at a place, or may do so once the text goes on."""
        return self._head.startswith("".join(text[place : place + LOOK].split())[: len(self._head)])

    def read(self, text: str, start: int, schemas: Schemas, most: int | None = None) -> tuple[list[Call], int] | None:
        """The calls that are opened at a place of a text, and where they end.

        What has been read of a text stays the same, however the text goes on.

        Args:
            text: an answer, special tokens marked.
            start: the place.
            schemas: of the tools that were offered.
            most: so many calls are enough.

        Returns:
            None if there is no call, or not the whole of it.
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
        """A part of the form with the special tokens as they are written, without blanks."""
        return "".join("".join(self.marks.get(character, character) for character in text).split())

    @cached_property
    def _head(self) -> str:
        """What a call begins with, without blanks; empty only where it is bare."""
        return "".join(self.opening.split()) + self.shape.begins_with


class Told(NamedTuple):
    """What a part of an answer says, and which tools it calls."""

    text: str
    calls: tuple[Call, ...]


class CallStream:
    """Tells calls from the rest of an answer, the same however its text is cut.

    What is no whole call stays text. Blanks around calls belong to them.

    Args:
        form: of the calls.
        tools: that were offered.
        most: the answer is done after so many calls.
    """

    def __init__(self, form: CallForm, tools: Sequence[Mapping[str, Any]], most: int | None = None) -> None:
        self._form, self._schemas, self._most = form, schemas_of(tools), most
        self._unmark = str.maketrans(dict.fromkeys(form.marks))
        self._held = ""
        """Text that may belong to a call."""
        self._blank = ""
        """Blanks that are told if words follow them."""
        self._has_said = self._has_called = False
        self._is_behind_call = False
        self.is_done = False
        """Whether there are as many calls as were wanted; nothing after them counts."""

    def push(self, text: str, is_last: bool = False) -> Told:
        """What has become certain with more text."""
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
            elif self._held and is_last:  # it only looked like one
                said += self._said(self._held[:1])
                self._held = self._held[1:]
            else:
                break
        if is_last and not self._is_behind_call:
            said, self._blank = said + self._blank, ""
        return Told(said, tuple(calls))

    def _next_start(self) -> int:
        """Where the held text may be a call."""
        if not self._form.is_bare:
            return self._form.find(self._held)
        if self._has_said or self._has_called:
            return len(self._held)
        words = self._held.lstrip()
        return len(self._held) - len(words) if self._form.may_begin(words) else len(self._held)

    def _read(self, is_last: bool) -> tuple[list[Call], int] | None:
        """The calls that the held text begins with; a bare one only if nothing else is there."""
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
        """Text that is no call, with the blanks before it; those behind it wait."""
        text = self._blank + text.translate(self._unmark)
        words = text.rstrip()
        self._blank = text[len(words) :]
        if not words:
            return ""
        if self._has_called and not self._has_said:
            words = words.lstrip()
        self._has_said, self._is_behind_call = True, False
        return words
