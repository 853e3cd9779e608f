"""What the adapter changes in the model's own words: some questions asked with it and without it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from loratune import console
from loratune.data.encoding import Encoder
from loratune.data.preparation import PreparedData
from loratune.errors import LoratuneError
from loratune.model.decoder import BASE, Decoder, Running
from loratune.model.sampling import Sampling
from loratune.model.slots import DecodingError

MAX_QUESTIONS = 8
COMPARED_TOKENS = 48
"""Of an answer; those of the base often go on and on."""
MAX_TOKENS = 256
"""Of the adapter's answers, so that the check takes seconds."""


@dataclass(frozen=True)
class Told:
    """One question and what was answered."""

    question: str
    expected: str
    base: str
    """The first tokens of it."""
    adapter: str
    has_changed: bool
    ended: bool | None
    """Whether the adapter's answer came to an end; None where the expected one is too long to wait for."""


@dataclass(frozen=True)
class Answers:
    """All questions that were asked."""

    told: list[Told]

    @property
    def changed(self) -> int:
        """How many are answered differently."""
        return sum(one.has_changed for one in self.told)

    @property
    def judged(self) -> int:
        """How many could be seen to end."""
        return sum(one.ended is not None for one in self.told)

    @property
    def ended(self) -> int:
        """How many of those ended by themselves."""
        return sum(one.ended is True for one in self.told)


def ask_questions(model: Any, encoder: Encoder, data: PreparedData) -> Answers | None:
    """Ask some of the rows' questions with the adapter and without it, the likeliest token each time.

    Args:
        model: PEFT model with the finished adapter, which is not trained any further: it stays in eval mode.
        encoder: the run's renderer.
        data: the run's rows; those of the validation are asked if there are any.

    Returns:
        None if the model has layers that cannot be decoded in a batch.
    """
    conversations = (data.validation or data.train).questions(MAX_QUESTIONS)
    with console.status("asking a few questions with the adapter and without it"):
        try:
            return _ask(model.eval(), encoder, conversations)
        except DecodingError:
            return None


def _ask(model: Any, encoder: Encoder, conversations: Sequence[Sequence[Any]]) -> Answers:
    decoder, end = Decoder(model, slots=MAX_QUESTIONS), frozenset({encoder.end_id})
    asked, prompts = [], []
    for messages in (messages for messages in conversations if len(messages) > 1):
        with suppress(LoratuneError):  # some templates render such a row only with the tools that it offers
            prompts.append(encoder.prompt_ids(messages[:-1]))
            asked.append(messages)
    expected = [len(encoder.answer_ids(messages[-1].get("content") or "")) for messages in asked]
    before = [Running(prompt, _greedy(COMPARED_TOKENS), end, BASE) for prompt in prompts]
    now = [
        Running(prompt, _greedy(min(2 * tokens + 32, MAX_TOKENS)), end, "default")
        for prompt, tokens in zip(prompts, expected, strict=True)
    ]
    for rows in (before, now):  # one after the other, so that no step mixes them
        for running in rows:
            decoder.add(running)
        while not decoder.is_idle:
            decoder.step()
    decoder.close()
    return Answers([_told(encoder.tokenizer, *one) for one in zip(asked, expected, before, now, strict=True)])


def _greedy(tokens: int) -> Sampling:
    return Sampling(max_new_tokens=tokens, repetition_penalty=1.0)


def _told(tokenizer: Any, messages: Sequence[Any], expected: int, before: Running, now: Running) -> Told:
    can_be_judged = now.finish == "stop" or expected <= MAX_TOKENS // 2
    compared = min(COMPARED_TOKENS, now.sampling.max_new_tokens)  # either may have been cut off there
    return Told(
        question=messages[-2].get("content") or "",
        expected=messages[-1].get("content") or "",
        base=tokenizer.decode(before.tokens, skip_special_tokens=True),
        adapter=tokenizer.decode(now.tokens, skip_special_tokens=True),
        has_changed=now.tokens[:compared] != before.tokens[:compared],
        ended=now.finish == "stop" if can_be_judged else None,
    )
