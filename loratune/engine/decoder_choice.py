"""Chooses how a model is decoded: sequences together where that gives the model's own logits, else each by itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from loratune.engine.adapter_switch import AdapterSwitch
from loratune.engine.forward_batch import DecodingError
from loratune.engine.plain_decoder import PlainDecoder
from loratune.engine.scheduler import Decoder
from loratune.engine.slot_decoder import SlotDecoder
from loratune.errors import Exit, LoratuneError
from loratune.model.adapter.own_parameters import BASE
from loratune.model.architecture.layer_memory import has_states, layer_memories
from loratune.model.architecture.structure import causal_model, rotates_by_longest
from loratune.model.memory import is_out_of_memory
from loratune.protocols import CausalModel, ModelConfig

TRIED = [list(range(1, 9)), list(range(9, 17))]
"""Token ids of two sequences. Every vocabulary has these, and none of them stands for an image."""
COUNTS = [(5, 0), (1, 1)]
"""Tokens of each that a pass reads: a prompt, and one of each, as of answers."""
COUNTS_WITH_STATES = [*COUNTS, (2, 2)]
"""The same where several tokens are read otherwise after others than at the beginning."""
NOISE = 4.0
"""How many times the effect of rounding errors the difference may be, where that is more than `_tolerance`: other
kernels make other errors, and in a model that routes tokens these may send a token elsewhere."""
MOST = 0.25
"""Relative difference that is never taken for rounding."""


def open_decoder(model: CausalModel, slots: int = 32, cache_budget_bytes: float | None = None) -> Decoder:
    """Return a decoder that gives the answers of a model.

    A few tokens of two sequences are read together, and the logits compared with those of the model's own forward: one
    pass of 12 tokens, and two over slots, of a prompt of 5 tokens and of one token each. That shows what no list of
    architectures would, such as an attention with terms that the decoder does not have. What few tokens cannot show is
    read from the model's config: sliding windows, kinds of layers and rotary angles.

    A GPU's pages are tried first, then slots that grow, for models that do not read keys and values as they were given.

    Args:
        model: a causal language model in eval mode, with or without PEFT adapters. Its attention may be replaced until
            the decoder is closed.
        slots: maximum number of running sequences.
        cache_budget_bytes: see `SlotDecoder`.

    Returns:
        Its `notice` says why sequences are decoded by themselves, if they are.

    Raises:
        LoratuneError: not even that works, as with a cache of the model's own.
    """
    config = causal_model(model).config
    if reason := _reason_without_trial(config):
        return _open_plain(model, slots, reason)
    expected, reason = _own_logits(model), ""
    for uses_pages in (True, False) if model.device.type == "cuda" else (False,):
        opening = partial(SlotDecoder, model, slots, cache_budget_bytes, uses_pages)
        try:
            return _open_tried(opening, expected)
        except Exception as error:  # what a model's code does with an unknown cache may be anything
            if is_out_of_memory(error):
                raise
            first_line = str(error).partition("\n")[0]
            reason = error.reason if isinstance(error, DecodingError) else f"{type(error).__name__}: {first_line}"
    return _open_plain(model, slots, reason)


def _reason_without_trial(config: ModelConfig) -> str:
    """Return why sequences of a model cannot share passes, from its config; nothing if that does not say."""
    strange = sorted({memory.other for memory in layer_memories(config) if memory.other})
    if strange:
        return f"its layers keep what loratune has no slots for ({', '.join(strange)})"
    if rotates_by_longest(config):
        return "its rotary angles depend on the longest sequence of a pass"
    return ""


def _open_tried(opening: Callable[[], SlotDecoder], expected: torch.Tensor) -> SlotDecoder:
    """Open a decoder and try it.

    Raises:
        DecodingError: it does not give the expected logits, or a layer's attention does not say which window it has.
        Exception: anything that the model's code raises.
    """
    decoder = opening()
    model = decoder.model
    try:
        difference = _difference(decoder.score(TRIED, _counts(model)), expected)
        windows = {memory.window for memory in layer_memories(causal_model(model).config) if memory.has_keys}
        if decoder.windows != windows:
            used, known = _listed(decoder.windows), _listed(windows)
            raise DecodingError(f"its attention has a window of {used}, and its config says {known}")
        if difference <= _tolerance(model, expected):
            return decoder
    except BaseException:
        decoder.close()
        raise
    decoder.close()  # the model's own attention is needed again
    if difference <= min(MOST, NOISE * _rounding(model, expected)):
        return opening()
    raise DecodingError(f"a pass of several sequences gives logits that are off by {difference:.2g} of their size")


def _open_plain(model: CausalModel, slots: int, reason: str) -> PlainDecoder:
    """Open a decoder of sequences by themselves, and try whether the model takes transformers' usual cache.

    Raises:
        LoratuneError: it does not.
    """
    decoder = PlainDecoder(model, slots, reason)
    try:
        decoder.loss(*TRIED)
    except Exception as error:
        decoder.close()
        if is_out_of_memory(error):
            raise
        name = type(causal_model(model)).__name__
        raise LoratuneError(
            f"{name} cannot be decoded by loratune ({type(error).__name__}: {error}); use transformers' generate",
            Exit.MODEL,
        ) from error
    return decoder


def _rounding(model: CausalModel, expected: torch.Tensor) -> float:
    """Return how far apart the model's own logits are with rounding errors in all products."""
    generator = torch.Generator(model.device).manual_seed(0)

    def disturb(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(output.shape, generator=generator, dtype=torch.float32, device=output.device) - 0.5
        return (output.float() * (1 + noise * torch.finfo(output.dtype).eps)).to(output.dtype)

    layers = (layer for layer in causal_model(model).modules() if isinstance(layer, nn.Linear | nn.Embedding))
    hooks = [layer.register_forward_hook(disturb) for layer in layers]
    try:
        return _difference(_own_logits(model), expected)
    finally:
        for hook in hooks:
            hook.remove()


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest relative difference of the logits [..., vocabulary]."""
    apart = (found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    return float(apart.max())


def _tolerance(model: CausalModel, logits: torch.Tensor) -> float:
    """Return the square root of the precision: half of the digits."""
    return math.sqrt(max(torch.finfo(kind).eps for kind in (model.dtype, logits.dtype)))


def _listed(windows: set[int | None]) -> str:
    return " and ".join(str(window or "no limit") for window in sorted(windows, key=lambda window: window or 0))


def _counts(model: CausalModel) -> list[tuple[int, int]]:
    return COUNTS_WITH_STATES if has_states(causal_model(model).config) else COUNTS


@torch.inference_mode()  # type: ignore[untyped-decorator]
def _own_logits(model: CausalModel) -> torch.Tensor:
    """Return what the base's own forward gives for `SlotDecoder.score`: [reads, vocabulary]."""
    ends, read = list[tuple[int, int]](), [0] * len(TRIED)
    for counts in _counts(model):
        read = [before + count for before, count in zip(read, counts, strict=True)]
        ends += [(row, read[row] - 1) for row, count in enumerate(counts) if count]
    switch = AdapterSwitch(model)
    given = switch.select([BASE] * len(TRIED))
    try:
        ids = torch.tensor([sequence[: max(read)] for sequence in TRIED], device=model.device)
        logits = model(input_ids=ids, use_cache=False, **given).logits
    finally:
        switch.close()
    return torch.stack([logits[end] for end in ends])
