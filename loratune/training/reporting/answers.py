"""Sample generations at the end of a run: validation prompts answered with and without the adapter."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from loratune import console
from loratune.data.encoding.encoder import Encoder
from loratune.data.formats.conversation import with_reasoning
from loratune.data.preparation import PreparedData
from loratune.engine.decoder_choice import open_decoder
from loratune.engine.request_handle import text_stream
from loratune.engine.sampling import Sampling
from loratune.engine.scheduler import Decoder
from loratune.engine.sequence import RunningSequence
from loratune.errors import LoratuneError, counted
from loratune.model.adapter.own_parameters import BASE
from loratune.progress import counted_progress
from loratune.protocols import AdaptedModel
from loratune.runs.report import Answers, Told

MAX_QUESTIONS = 8
COMPARED_TOKENS = 48
"""Number of compared tokens; a base often does not stop by itself."""
MAX_TOKENS = 256
"""Maximum tokens of the adapter's answers, so that the check takes seconds."""


@dataclass(frozen=True)
class Allowance:
    """Time limits of the sample generations."""

    seconds: float
    reading_speed: float
    """Tokens per second of the training."""
    is_over: Callable[[], bool]
    """Returns whether the user has interrupted."""


def ask_questions(model: AdaptedModel, encoder: Encoder, data: PreparedData, allowance: Allowance) -> Answers | None:
    """Ask some of the rows' questions with the adapter and without it, the likeliest token each time.

    Args:
        model: PEFT model with the final adapter; it stays in eval mode.
        encoder: the run's renderer.
        data: the run's rows; validation rows are preferred.
        allowance: limits the time. If processing the prompts alone would take over half of it, fewer prompts are used.

    Returns:
        None if the user interrupted.
    """
    conversations = (data.validation or data.train).questions(MAX_QUESTIONS)
    decoder = open_decoder(model.eval(), slots=MAX_QUESTIONS)
    try:
        return _ask(decoder, encoder, conversations, allowance)
    finally:
        decoder.close()


def _ask(
    decoder: Decoder, encoder: Encoder, conversations: Sequence[Sequence[Any]], allowance: Allowance
) -> Answers | None:
    asked = list(_readable(encoder, conversations, allowance))
    expected = [len(encoder.answer_ids(messages[-1].get("content") or "")) for messages, _ in asked]
    end = frozenset({encoder.end_id})
    before = [RunningSequence(prompt, _greedy(COMPARED_TOKENS), end, BASE) for _, prompt in asked]
    now = [
        RunningSequence(prompt, _greedy(min(2 * tokens + 32, MAX_TOKENS)), end, "default")
        for (_, prompt), tokens in zip(asked, expected, strict=True)
    ]
    if decoder.notice:
        console.say(decoder.notice)
    console.say(
        f"answering {counted(len(asked), 'question')} with and without the adapter, for {allowance.seconds:.0f} s at "
        "most; the run is saved, and Ctrl-C skips this"
    )
    if not _decode(decoder, before, now, allowance):
        return None
    rows = zip(asked, expected, before, now, strict=True)
    return Answers(
        tuple(
            _told(partial(_text_of, encoder), messages, tokens, *both)
            for (messages, _), tokens, *both in rows
            if all(running.tokens for running in both)
        )
    )


def _readable(
    encoder: Encoder, conversations: Sequence[Sequence[Any]], allowance: Allowance
) -> Iterator[tuple[Sequence[Any], list[int]]]:
    """Yield conversations with their prompt ids, as many as the time allows."""
    left = allowance.seconds / 2 * allowance.reading_speed
    is_first = True
    for messages in (messages for messages in conversations if len(messages) > 1):
        with suppress(LoratuneError):  # some templates need the row's tools to render it
            prompt = encoder.prompt_ids(messages[:-1])
            left -= len(prompt)
            if left >= 0 or is_first:
                yield messages, prompt
            is_first = False


def _decode(decoder: Decoder, before: list[RunningSequence], now: list[RunningSequence], allowance: Allowance) -> bool:
    """Generate the answers, those of the base in half of the time; return False if the user interrupted."""
    start, total = time.monotonic(), sum(running.sampling.max_new_tokens for running in (*before, *now))
    with counted_progress("tokens", total) as tell:
        # Separately, so that no step mixes adapters.
        for rows, until in ((before, start + allowance.seconds / 2), (now, start + allowance.seconds)):
            for running in rows:
                decoder.add(running)
            while not decoder.is_idle:
                if allowance.is_over():
                    return False
                decoder.step()
                tell(sum(map(_made, (*before, *now))), "")
                if time.monotonic() >= until:
                    break
            for running in rows:
                if running.finish is None:
                    decoder.remove(running)
    return True


def _made(running: RunningSequence) -> int:
    """Return an answer's tokens; a finished one counts in full."""
    return running.sampling.max_new_tokens if running.finish else len(running.tokens)


def _greedy(tokens: int) -> Sampling:
    return Sampling(max_new_tokens=tokens, repetition_penalty=1.0)


def _text_of(encoder: Encoder, running: RunningSequence) -> str:
    """Return an answer's text with reasoning as in rows."""
    if encoder.reasoning_form.is_of_rows:
        return str(encoder.tokenizer.decode(running.tokens, skip_special_tokens=True))
    stream = text_stream(encoder, running.prompt)
    parts = [*map(stream.push, running.tokens), stream.finish()]
    return with_reasoning("".join(part.text for part in parts), "".join(part.reasoning for part in parts))


def _told(
    text_of: Callable[[RunningSequence], str],
    messages: Sequence[Any],
    expected: int,
    before: RunningSequence,
    now: RunningSequence,
) -> Told:
    # Beyond the end of an unfinished answer, the two may still be equal.
    compared = min((len(one.tokens) for one in (before, now) if one.finish != "stop"), default=None)
    could_end = now.finish == "length" and expected <= MAX_TOKENS // 2
    return Told(
        question=messages[-2].get("content") or "",
        expected=messages[-1].get("content") or "",
        base=text_of(before),
        adapter=text_of(now),
        has_changed=now.tokens[:compared] != before.tokens[:compared],
        ended=True if now.finish == "stop" else False if could_end else None,
        cut_short=before.finish is None or now.finish is None,
        base_ended=before.finish == "stop",
    )
