"""Compares the logits of models on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional

from loratune.model.architecture.head import OwnHead
from loratune.model.architecture.structure import decoder_of
from loratune.model.weights.mapped import device_of
from loratune.protocols import CausalModel
from loratune.runs.probe import ProbeRow
from loratune.runs.verification import Parity

TOKENS_AT_ONCE = 1024
"""Tokens per batch, including padding: more would take memory, fewer would read the weights more often."""
ROUNDED = 1e-6
"""nats below 0 that float32 sums of a divergence may end at; it is never negative."""
POSITIONS_AT_ONCE = 32
"""Positions whose logits are in memory at once: with 150,000 tokens, 0.6 MB each, several times."""


@dataclass(frozen=True)
class InState:
    """A model, and a context that changes its weights or code during its forward pass."""

    model: CausalModel
    state: Callable[[], AbstractContextManager[None]]


AnyModel = CausalModel | InState


def compare_models(reference: AnyModel, candidates: Sequence[AnyModel], rows: Sequence[ProbeRow]) -> list[Parity]:
    """Run models over the labelled positions of some rows, and compare each candidate with the reference.

    Args:
        reference: a causal language model, with or without PEFT's layers.
        candidates: models with the same vocabulary.
        rows: rows with at least one label in total.
    """
    pairs = [(0, place) for place in range(1, len(candidates) + 1)]
    return compare_pairs([reference, *candidates], pairs, rows)


def compare_pairs(
    models: Sequence[AnyModel], pairs: Sequence[tuple[int, int]], rows: Sequence[ProbeRow]
) -> list[Parity]:
    """Run each model once, and compare pairs of them.

    Args:
        models: causal language models with the same vocabulary, or `InState`; each runs over a batch after those
            before it.
        pairs: indices of a reference and a candidate in `models`.
        rows: rows with at least one label in total.
    """
    totals = [_Totals() for _ in pairs]
    for batch in _batches(rows):
        for logits in zip(*(_logits(model, batch) for model in models), strict=True):
            for total, (expected, found) in zip(totals, pairs, strict=True):
                total.add(logits[expected], logits[found].to(logits[expected].device))
    return [total.parity() for total in totals]


class Likeliest(NamedTuple):
    """A model's likeliest token at a labelled position."""

    token: int
    lead: float
    """nats by which the token is likelier than the label; 0 if none is."""


def likeliest_tokens(model: CausalModel, rows: Sequence[ProbeRow]) -> list[list[Likeliest]]:
    """For each row the model's likeliest token at every labelled position."""
    labels = iter([row.labels[place + 1] for row in rows for place in _places(row)])
    found = [
        Likeliest(int(one.argmax()), float(one.max() - one[next(labels)]))
        for batch in _batches(rows, in_order=True)
        for logits in _logits(model, batch)
        for one in logits
    ]
    places = iter(found)
    return [[next(places) for _ in _places(row)] for row in rows]


def _places(row: ProbeRow) -> list[int]:
    """Return the positions whose next token is labelled."""
    return [place - 1 for place, label in enumerate(row.labels) if place and label >= 0]


def _batches(rows: Sequence[ProbeRow], in_order: bool = False) -> Iterator[list[ProbeRow]]:
    """Yield batches of at most TOKENS_AT_ONCE padded tokens, or of one longer row."""
    batch: list[ProbeRow] = []
    longest = 0
    for row in rows if in_order else sorted(rows, key=lambda row: len(row.input_ids)):
        longest = max(longest, len(row.input_ids))
        if batch and longest * (len(batch) + 1) > TOKENS_AT_ONCE:
            yield batch
            batch, longest = [], len(row.input_ids)
        batch.append(row)
    if batch:
        yield batch


def _logits(compared: AnyModel, batch: list[ProbeRow]) -> Iterator[torch.Tensor]:
    """float32 logits (at most POSITIONS_AT_ONCE, vocabulary) at the labelled positions, piece by piece."""
    model, state = (compared.model, compared.state) if isinstance(compared, InState) else (compared, nullcontext)
    decoder, head, device = decoder_of(model), OwnHead(model), device_of(model)
    longest = max(len(row.input_ids) for row in batch)
    # Padding is on the right, where causal attention hides it from all other positions.
    ids = torch.tensor([row.input_ids + [0] * (longest - len(row.input_ids)) for row in batch], device=device)
    with torch.inference_mode(), state():
        states = decoder(input_ids=ids, use_cache=False).last_hidden_state
    hidden = torch.cat([states[number, _places(row)] for number, row in enumerate(batch)])
    for start in range(0, len(hidden), POSITIONS_AT_ONCE):
        with torch.inference_mode(), state():  # not around the yield: the mode would leak to the caller
            logits = head(hidden[start : start + POSITIONS_AT_ONCE]).float()
        yield logits


class _Totals:
    """Sums over batches of logits."""

    def __init__(self) -> None:
        self.tokens = 0
        self.agreeing = 0
        self.disagreeing = 0
        self.kl = 0.0
        self.difference = 0.0
        self.logit = 0.0

    def add(self, expected: torch.Tensor, found: torch.Tensor) -> None:
        """Add the logits (positions, vocabulary) of both models."""
        self.tokens += len(expected)
        likeliest = found.argmax(-1)
        self.agreeing += int((expected.argmax(-1) == likeliest).sum())
        behind = expected.max(-1).values - expected.gather(-1, likeliest.unsqueeze(-1)).squeeze(-1)
        self.disagreeing += int((behind > math.log(2)).sum())
        self.difference = _largest(self.difference, (expected - found).abs())
        self.logit = _largest(self.logit, expected.abs())
        wanted, given = expected.log_softmax(-1), found.log_softmax(-1)
        self.kl += float(functional.kl_div(given, wanted, reduction="sum", log_target=True))

    def parity(self) -> Parity:
        return Parity(
            tokens=self.tokens,
            largest_difference=self.difference,
            mean_kl=0.0 if -ROUNDED < self.kl / self.tokens < 0 else self.kl / self.tokens,
            top1_agreement=self.agreeing / self.tokens,
            clear_disagreement=self.disagreeing / self.tokens,
            largest_logit=self.logit,
        )


def _largest(known: float, values: torch.Tensor) -> float:
    """Return the maximum; unlike Python's max, it preserves NaN."""
    return float(torch.maximum(values.max(), values.new_tensor(known)))
