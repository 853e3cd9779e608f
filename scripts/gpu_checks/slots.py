"""Compares answers that are decoded together, over slots of keys and states, with each answer by itself."""

from __future__ import annotations

import random
from typing import Any

import torch

from gpu_checks.decoding import free_memory
from gpu_checks.families import tiny_model
from gpu_checks.table import Figures, Workplace

KINDS = ("qwen3_5", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "gemma3", "granitemoehybrid", "lfm2")
LENGTHS = (3, 40, 1, 17, 300, 9, 70, 2)
"""Of the prompts, of which some share passes and others wait for a slot."""
SLOTS, ANSWER = 3, 24


def slots(place: Workplace) -> Figures:
    """Return the share of tokens that are those of the plain decoder, and the families without slots."""
    shares: dict[str, float] = {}
    alone: list[str] = []
    for kind in KINDS:
        together, by_themselves, notice = answers(place, kind)
        pairs = [
            pair for one, other in zip(together, by_themselves, strict=True) for pair in zip(one, other, strict=True)
        ]
        shares[kind] = sum(one == other for one, other in pairs) / len(pairs)
        alone += [f"{kind}: {notice}"] if notice else []
        free_memory()
    return {
        "lowest share of equal tokens": min(shares.values()), "shares": shares, "without slots": len(alone),
        "decoded one by one": alone,
    }  # fmt: skip


def answers(place: Workplace, kind: str) -> tuple[list[list[int]], list[list[int]], str | None]:
    """Return a float32 model's greedy answers over slots and by itself, and why it has no slots, if so."""
    from loratune.engine.decoder_choice import open_decoder
    from loratune.engine.plain_decoder import PlainDecoder
    from loratune.model.from_folder import load_from_folder
    from loratune.model.hardware import detect_hardware

    folder = tiny_model(place, kind)
    options = {"dtype": torch.float32, "attn_implementation": "sdpa", "device_map": {"": detect_hardware().device}}
    model = load_from_folder(folder, **options).eval()
    decoder = open_decoder(model, SLOTS)
    together = decoded(decoder)
    decoder.close()
    return together, decoded(PlainDecoder(model, SLOTS)), decoder.notice


def decoded(decoder: Any) -> list[list[int]]:
    """Return the answers to all prompts; so many at a time as there are slots."""
    from loratune.engine.sampling import Sampling
    from loratune.engine.sequence import RunningSequence
    from loratune.model.adapter.own_parameters import BASE

    generator = random.Random(0)
    prompts = [[generator.randrange(5, 3000) for _ in range(length)] for length in LENGTHS]
    sampling = Sampling(max_new_tokens=ANSWER)
    asked = [RunningSequence(prompt, sampling, frozenset(), BASE) for prompt in prompts]
    for one in asked:
        decoder.add(one)
    while not decoder.is_idle:
        decoder.step()
    return [list(one.tokens) for one in asked]
