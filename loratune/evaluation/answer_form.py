"""The form of answers: whether they end by themselves, repeat themselves, and think as the prompt asks for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

from loratune.data.checks.inspection import is_repetitive
from loratune.data.encoding.encoder import Encoder
from loratune.data.formats.conversation import CLOSING, OPENING, reasoning_apart
from loratune.evaluation.result import Form

ENDINGS = ("stop", "tool_calls")
"""Finish reasons of answers that ended by themselves."""


@dataclass(frozen=True)
class AnswerForm:
    """The form of one answer."""

    ended: bool
    cut: bool
    repetitive: bool
    unwanted_thinking: bool
    missing_thinking: bool

    @property
    def is_sound(self) -> bool:
        """Whether it ended by itself, without repeating itself, and thought as the prompt asks for."""
        return self.ended and not (self.repetitive or self.unwanted_thinking or self.missing_thinking)


class FormReader:
    """Tells the form of a model's answers.

    Args:
        encoder: renders the prompts of the model.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._wants_thinking = encoder.asks_for_reasoning
        self._takes_thinking = self._wants_thinking or encoder.takes_reasoning

    def form_of(self, known: Mapping[str, Any], reference: str | None) -> AnswerForm:
        """Return the form of an answer.

        Args:
            known: the answer as in the file of the results.
            reference: the expected answer; one with reasoning allows it.
        """
        text, reasoning = str(known["answer"]), str(known.get("reasoning", ""))
        thinks = bool(reasoning.strip()) or text.lstrip().startswith((OPENING, CLOSING))
        takes_thinking = self._takes_thinking or bool(reasoning_apart(reference or "")[0])
        return AnswerForm(
            ended=known["finish"] in ENDINGS,
            cut=known["finish"] == "length",
            repetitive=is_repetitive(self._encoder.answer_ids(reasoning + text)),
            unwanted_thinking=thinks and not takes_thinking,
            missing_thinking=self._wants_thinking and not thinks,
        )


def summed(forms: Iterable[AnswerForm]) -> Form:
    """Count the answers of each form."""
    counts = [astuple(form) for form in forms]
    return Form(len(counts), *(sum(column) for column in zip(*counts, strict=True)))
