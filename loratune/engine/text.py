"""Detokenises a stream: complete characters only, with stop strings, and reasoning separate from the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from loratune.data.template.reasoning_form import StreamedForm
from loratune.protocols import Tokenizer

ROWS_FORM = StreamedForm()
UNFINISHED = "\ufffd"
"""What a tokenizer decodes an incomplete character to."""
LONGEST_CHARACTER = 4
"""In byte-level tokens."""
MOST_HELD = 32
"""Tokens that may be held back; so many without a complete character are none."""


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
        form: how reasoning is written; its placeholder characters are dropped, unless `marks` has them too.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        in_reasoning: bool = False,
        beginning: str = "",
        marks: Mapping[int, str] | None = None,
        form: StreamedForm = ROWS_FORM,
    ) -> None:
        kept = marks or {}
        self._tokenizer, self._marks = tokenizer, {**form.marks, **kept}
        self._dropped = str.maketrans({mark: None for token, mark in form.marks.items() if token not in kept})
        self._form = form
        beginning = self._as_streamed(beginning)
        # Reasoning tags are handled separately.
        self._awaited = "" if form.closing in beginning else beginning
        """Text of the template before an answer, which may come next."""
        self._stop = tuple(text for text in stop if text)
        self._ids: list[int] = []
        """Of the last text that ended with a complete character, and of what has come since."""
        self._since = 0
        """Where in `_ids` that text ends."""
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
            self._ids, self._since, self._told = [], 0, ""
            return self._sorted(new, is_last=False)
        if not self._decode([token]) and not self._decode([token, token]):
            return Parts("", "")  # special; a blank at the start of a text may be dropped, but not two
        self._ids.append(token)
        text = self._decode(self._ids)
        is_too_long = len(self._ids) - self._since > MOST_HELD
        # Bytes that are no character yet are decoded to one replacement character, or to one each.
        certain = text.removesuffix(UNFINISHED) if is_too_long else text.rstrip(UNFINISHED)
        new = certain[len(self._told) :]
        self._told += new
        if certain == text:
            # Keep some text, since tokenizers may drop the leading space of a text's first token.
            self._ids = self._ids[self._since :]
            self._since, self._told = len(self._ids), self._decode(self._ids)
        elif is_too_long:
            self._ids, self._since = self._ids[-LONGEST_CHARACTER:], 0
            self._told = self._decode(self._ids).removesuffix(UNFINISHED)
        return self._sorted(new, is_last=False)

    def finish(self) -> Parts:
        """Return the text that was held back."""
        return self._sorted(self._decode(self._ids)[len(self._told) :], is_last=True)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _as_streamed(self, text: str) -> str:
        """Return a text of the template as the stream will have it."""
        ids = self._tokenizer(text, add_special_tokens=False).input_ids if text else []
        runs = [(mark, list(run)) for mark, run in groupby(ids, key=self._marks.get)]
        return "".join(mark * len(run) if mark else self._decode(run) for mark, run in runs)

    def _sorted(self, new: str, is_last: bool) -> Parts:
        """Assign text to reasoning or answer, and hold back what may become a tag or a stop string."""
        self._held += new
        text = reasoning = ""
        while self._held and not self.stopped:
            if self._awaited:
                if not is_last and len(self._held) < len(self._awaited) and self._awaited.startswith(self._held):
                    break
                self._held, self._awaited = self._held.removeprefix(self._awaited), ""
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
        return Parts(text.translate(self._dropped), reasoning.translate(self._dropped))

    def _enter(self, tag: str) -> None:
        if tag in self._stop:
            self.stopped = True
        else:
            self._is_blank = True
            if tag == self._form.opening:
                self._place = "reasoning"
            else:  # more reasoning may follow only where another text begins the answer
                self._awaited = self._form.answer_start
                self._place = "start" if self._awaited else "answer"

    def _next(self, is_last: bool) -> tuple[str, str | None]:
        """Remove text up to the next tag, and the tag; without a tag, remove what cannot be the start of one."""
        opening, said = self._form.opening, self._held.strip()
        if self._place == "start" and said and not opening.startswith(said[: len(opening)]):
            self._place = "answer"  # reasoning only occurs at the start
        tags = (*self._stop, *{"start": (opening,), "reasoning": (self._form.closing,)}.get(self._place, ()))
        # The tag that is completed first, however the text is split; of several, the longest.
        places = [(self._held.find(tag) + len(tag), self._held.find(tag), tag) for tag in tags if tag in self._held]
        if places:
            _, place, tag = min(places)
            here, self._held = self._held[:place], self._held[place + len(tag) :]
            return ("" if tag == opening else here), tag
        keep = 0 if is_last else max((_overlap(self._held, tag) for tag in tags), default=0)
        if self._place == "start" and not is_last:
            keep = len(self._held)  # whitespace before a possible tag
        here, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return here, None


def _overlap(text: str, tag: str) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of a tag."""
    return next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if tag.startswith(text[-size:])), 0)
