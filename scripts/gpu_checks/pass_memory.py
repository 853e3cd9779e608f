"""Compares the memory that loratune expects of a pass with what the pass takes."""

from __future__ import annotations

import gc
from typing import Any

import torch

from gpu_checks import machine
from gpu_checks.models import adapted_base, packed, random_model, random_rows, use_loratune
from gpu_checks.table import Figures, Workplace
from gpu_checks.training_speed import layers_of

TOKENS = (1024, 4096, 16_384)
ROW = 512


def pass_memory(place: Workplace) -> Figures:
    """Return estimate and measurement of passes of several sizes, with and without gradient checkpointing.

    Without a GPU resident memory is compared, which holds what oneDNN and the allocator keep as well.
    """
    from loratune.model.hardware import detect_hardware
    from loratune.training.activations import measure_passes

    dtype = torch.bfloat16 if place.is_gpu else torch.float32
    model = adapted_base(*random_model(place, layers_of(place)), dtype)
    use_loratune(model)
    figures: dict[str, Any] = {}
    ratios = []
    hardware = detect_hardware()
    memory = measure_passes(model, True, ROW, max(TOKENS), hardware)
    for is_recomputed in (False, True):
        if is_recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for tokens in TOKENS if place.is_gpu else TOKENS[:1]:
            name = f"{tokens} tokens{', checkpointing' if is_recomputed else ''}"
            needed = memory.needed(tokens, is_recomputed)
            if needed > memory.free:
                figures[name] = f"{needed / 1e9:.2f} GB are needed, {memory.free / 1e9:.2f} free"
                continue
            measured = taken_by_a_step(model, tokens)
            ratios.append(needed / measured)
            figures[name] = f"{needed / 1e9:.2f} GB estimated, {measured / 1e9:.2f} measured: {ratios[-1]:.2f}"
    return figures | {"lowest estimate / measured": min(ratios), "highest estimate / measured": max(ratios)}


def taken_by_a_step(model: Any, tokens: int) -> int:
    """Return the bytes that two optimizer steps add to the model's at their peak."""
    rows = random_rows(3000, [ROW] * (tokens // ROW))
    batch = packed(rows, model.device)
    model.train()
    gc.collect()
    machine.reset_peak()
    before = machine.memory_now()
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-6)
    for _ in range(2):
        model(**batch, summed_loss=True).loss_sum.backward()
        optimizer.step()
        optimizer.zero_grad()
    return machine.memory_peak() - before
