"""Measures what keys and values take of a 24 GB card, beside what they hold and what the engine has promised."""

from __future__ import annotations

from typing import Any

from gpu_checks import machine
from gpu_checks.decoding import engine_of, greedy, serve
from gpu_checks.models import random_model
from gpu_checks.table import Figures, Workplace
from gpu_checks.training_speed import layers_of

FREE = 25.5e9
"""Of a card of 24 GiB, without a process on it."""
LONG_CHAT, SHORT_ANSWER = 16_000, 64
CLIENTS, PROMPT, ANSWER = 20, 3900, 196
"""Conversations of 4,096 tokens, most of them prompt, which is read many times as fast as an answer is written."""
MIXED = (20, 50, 400, 1200, 3000, 90, 700, 2000)
"""Prompts of very different lengths."""


def cache_memory(place: Workplace) -> Figures:
    """Return reserved / written of one long chat, and the peak of many clients beside the promise."""
    from loratune.engine.cache_choice import CACHE_SHARE
    from loratune.model.hardware import detect_hardware
    from loratune.model.memory import free_memory_bytes

    base, adapter = random_model(place, layers_of(place))
    with machine.only_free(FREE):
        engine = engine_of({"adapter": adapter}, base)
        one = engine.decoder.filled_cache().token_bytes
        before, promised = machine.memory_now(), CACHE_SHARE * free_memory_bytes(detect_hardware())
        held, written = held_during(engine, [greedy(text_of(LONG_CHAT), SHORT_ANSWER)], before, one)
        figures: dict[str, Any] = {"reserved / written": held / (written * one)}
        fitting = min(CLIENTS, int(promised // ((PROMPT + ANSWER) * one)))
        for name, requests in (
            ("many clients", [greedy(text_of(PROMPT, number), ANSWER) for number in range(CLIENTS)]),
            ("mixed prompts", [greedy(text_of(length, length), 256) for length in MIXED]),
        ):
            machine.reset_peak()
            serve(engine, requests)
            figures[f"{name}: peak / promised"] = (machine.memory_peak() - before) / promised
        engine.close()
    peaks = [figures[f"{name}: peak / promised"] for name in ("many clients", "mixed prompts")]
    return figures | {"peak / promised": max(peaks), "clients at once, by the promise": fitting, "bytes per token": one}


def text_of(tokens: int, number: int = 0) -> str:
    """Return a text of about so many tokens that begins with a number."""
    from transformers import AutoTokenizer

    from gpu_checks.models import TINY_QWEN

    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN)
    ids = tokenizer(f"{number} " + "what is this " * tokens).input_ids[:tokens]
    return str(tokenizer.decode(ids))


def held_during(engine: Any, requests: list[Any], before: int, token_bytes: int) -> tuple[int, int]:
    """Return the most bytes that requests hold between passes, and the tokens written.

    Of a pool that is made once, these are the pages that are handed out.
    """
    from loratune.engine.paged_cache import PAGE

    held: list[int] = []
    plain_forward, cache = engine.model.forward, engine.decoder._cache

    def forward(*arguments: Any, **inputs: Any) -> Any:
        pages = sum(map(bool, cache._users[1:])) if cache.is_fixed else 0
        held.append(pages * PAGE * token_bytes if cache.is_fixed else machine.memory_now() - before)
        return plain_forward(*arguments, **inputs)

    engine.model.forward = forward
    served = serve(engine, requests)
    engine.model.forward = plain_forward
    return max(held), sum(map(len, (*served.prompts, *served.tokens)))
