"""Shortens conversations that exceed the maximum length, at the prompt or at the answer."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace

from loratune.data.encoding.encoder import IGNORED, Encoder, Example
from loratune.data.formats.conversation import Conversation, Message

NEAR_CUTS = 8
"""In characters. Token counts are not monotonic in length, so cuts up to this much longer are tried too."""


def shorten(
    encoder: Encoder, conversation: Conversation, max_length: int, policy: str, train_on: str, train_thinking: bool
) -> list[Example]:
    """Return the training sequences of a conversation, each at most `max_length` tokens long.

    Answers whose turn fits are trained unchanged. Each other answer gets a shortened sequence of its own, or none if it
    cannot be shortened enough.

    Args:
        encoder: renders the conversation.
        conversation: the conversation to shorten.
        max_length: maximum tokens per sequence.
        policy: `truncate_prompt` drops the earliest turns, then the start of the last question. `truncate_answer` drops
            the end of the answer and its end token, so that the model does not learn to stop there.
        train_on: `all` answers, or only the `last`.
        train_thinking: whether reasoning is trained too.
    """

    def encode_last(turn: Conversation) -> Example:
        return encoder.encode(turn, "last", train_thinking)[0]

    turns = {place: _up_to(conversation, place) for place in conversation.trained_answers(train_on)}
    examples = {place: encode_last(turn) for place, turn in turns.items()}
    too_long = [place for place, example in examples.items() if len(example.input_ids) > max_length]
    found = _fitting(encoder, conversation, [place for place in turns if place not in too_long], train_thinking)
    for place in too_long:
        if policy == "truncate_answer":
            shortened = _with_less_answer(examples[place], max_length)
        else:
            shortened = _with_less_prompt(turns[place], encode_last, max_length)
        found += [shortened] if shortened else []
    return found


def _up_to(conversation: Conversation, place: int) -> Conversation:
    """Return the conversation up to and including one of its answers."""
    return replace(conversation, messages=conversation.messages[: place + 1])


def _fitting(encoder: Encoder, conversation: Conversation, places: list[int], train_thinking: bool) -> list[Example]:
    """Encode some answers; they share sequences where the template allows it."""
    if not places:
        return []
    others = frozenset(range(places[-1])) - frozenset(places)
    return encoder.encode(replace(_up_to(conversation, places[-1]), untrained=others), "all", train_thinking)


def _with_less_answer(example: Example, max_length: int) -> Example | None:
    cut = Example(example.input_ids[:max_length], example.labels[:max_length])
    return cut if any(label != IGNORED for label in cut.labels) else None


def _with_less_prompt(
    conversation: Conversation, encode_last: Callable[[Conversation], Example], max_length: int
) -> Example | None:
    """Drop the earliest turns, then the start of the last question."""
    messages = conversation.messages
    system = messages[:1] if messages[0]["role"] == "system" else ()
    questions = [place for place, message in enumerate(messages) if message["role"] == "user"]
    question = messages[questions[-1]]["content"]

    def latest(turns: int) -> Example:
        kept = (*system, *messages[questions[-turns] :])
        return encode_last(replace(conversation, messages=kept, untrained=frozenset()))

    def end_of_question(characters: int) -> Example:
        asked: Message = {"role": "user", "content": question[-characters:]}
        kept = (*system, asked, *messages[questions[-1] + 1 :])
        return encode_last(replace(conversation, messages=kept, untrained=frozenset()))

    def fits(example: Example) -> bool:
        return len(example.input_ids) <= max_length

    turns = _most(len(questions) - 1, lambda count: fits(latest(count)))
    if turns:
        return latest(turns)
    characters = _most(len(question) - 1, lambda count: fits(end_of_question(count)))
    more = range(characters + 1, min(characters + NEAR_CUTS, len(question)))
    characters = max((count for count in more if fits(end_of_question(count))), default=characters)
    return end_of_question(characters) if characters else None


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """Return the largest count up to a limit that fits, found by bisection; 0 if even 1 does not fit."""
    return bisect_left(range(1, limit + 1), True, key=lambda count: not fits(count))
