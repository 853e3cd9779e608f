"""Token ids as text, piece by piece: whole characters only, up to a stop text, reasoning and answer apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from loratune.protocols import Tokenizer

OPENING, CLOSING = "<think>", "</think>"
UNFINISHED = "\ufffd"
"""What a tokenizer says for the first bytes of a character."""
LONGEST_CHARACTER = 4
"""Tokens of one byte each."""


class Parts(NamedTuple):
    """New text of an answer."""

    text: str
    reasoning: str


class TextStream:
    """The text of one answer.

    Args:
        tokenizer: a transformers tokenizer.
        stop: texts that end the answer.
        in_reasoning: whether the prompt has already opened the reasoning.
        beginning: what the template writes before an answer without reasoning, and what is no part of it.
        marks: ids of special tokens → characters that stand for them in the text. All others are left out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        in_reasoning: bool = False,
        beginning: str = "",
        marks: Mapping[int, str] | None = None,
    ) -> None:
        self._tokenizer, self._marks = tokenizer, marks or {}
        # Tags are told apart below.
        self._beginning = "" if CLOSING in beginning else self._without_control_tokens(beginning)
        self._stop = tuple(text for text in stop if text)
        self._ids: list[int] = []
        self._told = ""
        """Text of `_ids` that has been passed on."""
        self._held = ""
        """Text that may become a tag or a stop text."""
        self._place = "reasoning" if in_reasoning else "start"
        self._is_blank = in_reasoning
        """Whether blanks at this place are left out: they belong to the tags."""
        self.stopped = False
        """Whether a stop text has come; nothing after it counts."""

    def push(self, token: int) -> Parts:
        """The text that has become certain with one more token."""
        if token in self._marks:
            new = self._decode(self._ids)[len(self._told) :] + self._marks[token]
            self._ids, self._told = [], ""
            return self._sorted(new, is_last=False)
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(UNFINISHED) and len(self._ids) <= LONGEST_CHARACTER + 1:
            return Parts("", "")
        new = text[len(self._told) :]
        # The last token stays, since a tokenizer may write the first one of a text without its leading blank.
        self._ids = self._ids[-1:]
        self._told = self._decode(self._ids)
        return self._sorted(new, is_last=False)

    def finish(self) -> Parts:
        """What was held back."""
        return self._sorted(self._decode(self._ids)[len(self._told) :], is_last=True)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _without_control_tokens(self, text: str) -> str:
        return self._decode(self._tokenizer(text, add_special_tokens=False).input_ids) if text else ""

    def _sorted(self, new: str, is_last: bool) -> Parts:
        """Sort text to where it belongs, and hold back what may still turn into a tag or a stop text."""
        self._held += new
        text = reasoning = ""
        if self._beginning:
            if not is_last and len(self._held) < len(self._beginning) and self._beginning.startswith(self._held):
                return Parts("", "")
            self._held = self._held.removeprefix(self._beginning)
            self._beginning = ""
        while self._held and not self.stopped:
            here, tag = self._next(is_last)
            if self._is_blank:
                here = here.lstrip()
                self._is_blank = not here
            if self._place == "reasoning":
                reasoning += here
            else:
                text += here
            if tag is None:
                break
            self._enter(tag)
        return Parts(text, reasoning)

    def _enter(self, tag: str) -> None:
        if tag in self._stop:
            self.stopped = True
        else:
            self._place = "reasoning" if tag == OPENING else "answer"
            self._is_blank = True

    def _next(self, is_last: bool) -> tuple[str, str | None]:
        """Take text off up to the next tag, the tag with it; without one, as much as cannot be the start of one."""
        if self._place == "start" and self._held.strip() and not OPENING.startswith(self._held.strip()[: len(OPENING)]):
            self._place = "answer"  # an answer that does not begin with reasoning has none
        tags = (*self._stop, *{"start": (OPENING,), "reasoning": (CLOSING,)}.get(self._place, ()))
        # The one that is complete first, however much of the text comes at once; of several the longest.
        places = [(self._held.find(tag) + len(tag), self._held.find(tag), tag) for tag in tags if tag in self._held]
        if places:
            _, place, tag = min(places)
            here, self._held = self._held[:place], self._held[place + len(tag) :]
            return ("" if tag == OPENING else here), tag
        keep = 0 if is_last else max((_overlap(self._held, tag) for tag in tags), default=0)
        if self._place == "start" and not is_last:
            keep = len(self._held)  # blanks before a tag that may come
        here, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return here, None


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that a tag begins with."""
    return next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-size:])), 0)
