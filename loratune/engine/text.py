"""Detokenises a stream: complete characters only, with stop strings, and reasoning separate from the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from loratune.protocols import Tokenizer

OPENING, CLOSING = "<think>", "</think>"
UNFINISHED = "\ufffd"
"""What a tokenizer decodes an incomplete character to."""
LONGEST_CHARACTER = 4
"""In byte-level tokens."""


class Parts(NamedTuple):
    """New text of an answer."""

    text: str
    reasoning: str


class TextStream:
    """The text of one answer.

    Args:
        tokenizer: a transformers tokenizer.
        stop: strings that end the answer.
        in_reasoning: whether the prompt already opened the reasoning block.
        beginning: text that the template writes before an answer without reasoning; removed from the answer.
        marks: ids of special tokens → placeholder characters in the text. Other special tokens are dropped.
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
        # Reasoning tags are handled separately.
        self._beginning = "" if CLOSING in beginning else self._without_control_tokens(beginning)
        self._stop = tuple(text for text in stop if text)
        self._ids: list[int] = []
        self._told = ""
        """Text of `_ids` that has been emitted."""
        self._held = ""
        """Text that may turn out to be a tag or a stop string."""
        self._place = "reasoning" if in_reasoning else "start"
        self._is_blank = in_reasoning
        """Whether whitespace is dropped here, because it belongs to a tag."""
        self.stopped = False
        """Whether a stop string was found; later text is ignored."""

    def push(self, token: int) -> Parts:
        """Add a token, and return the text that is now certain."""
        if token in self._marks:
            new = self._decode(self._ids)[len(self._told) :] + self._marks[token]
            self._ids, self._told = [], ""
            return self._sorted(new, is_last=False)
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(UNFINISHED) and len(self._ids) <= LONGEST_CHARACTER + 1:
            return Parts("", "")
        new = text[len(self._told) :]
        # Keep the last token, since tokenizers may drop the leading space of a text's first token.
        self._ids = self._ids[-1:]
        self._told = self._decode(self._ids)
        return self._sorted(new, is_last=False)

    def finish(self) -> Parts:
        """Return the text that was held back."""
        return self._sorted(self._decode(self._ids)[len(self._told) :], is_last=True)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _without_control_tokens(self, text: str) -> str:
        return self._decode(self._tokenizer(text, add_special_tokens=False).input_ids) if text else ""

    def _sorted(self, new: str, is_last: bool) -> Parts:
        """Assign text to reasoning or answer, and hold back what may become a tag or a stop string."""
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
        """Remove text up to the next tag, and the tag; without a tag, remove what cannot be the start of one."""
        if self._place == "start" and self._held.strip() and not OPENING.startswith(self._held.strip()[: len(OPENING)]):
            self._place = "answer"  # reasoning only occurs at the start
        tags = (*self._stop, *{"start": (OPENING,), "reasoning": (CLOSING,)}.get(self._place, ()))
        # The tag that is completed first, however the text is split; of several, the longest.
        places = [(self._held.find(tag) + len(tag), self._held.find(tag), tag) for tag in tags if tag in self._held]
        if places:
            _, place, tag = min(places)
            here, self._held = self._held[:place], self._held[place + len(tag) :]
            return ("" if tag == OPENING else here), tag
        keep = 0 if is_last else max((_overlap(self._held, tag) for tag in tags), default=0)
        if self._place == "start" and not is_last:
            keep = len(self._held)  # whitespace before a possible tag
        here, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return here, None


def _overlap(text: str, tag: str) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of a tag."""
    return next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-size:])), 0)
