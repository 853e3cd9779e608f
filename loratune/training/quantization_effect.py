"""Looks at the weights of a base: their memory, and how far quantised ones are from 16 bits on some rows."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from loratune import console
from loratune.data.assembly.dataset import as_dataset
from loratune.data.assembly.split import Split
from loratune.data.preparation import PreparedData
from loratune.errors import counted, reason_of
from loratune.model.architecture.head import head_of
from loratune.model.architecture.recurrent import recurrent_modules
from loratune.model.architecture.roles import expert_stacks
from loratune.model.architecture.structure import decoder_of
from loratune.model.sharding.gathering import base_norms, is_sharded
from loratune.model.weights.held import bytes_by_group, held_bytes, own_bytes
from loratune.model.weights.unpacked import keep_unpacked
from loratune.model.weights.unquantised import unquantised
from loratune.protocols import CausalModel
from loratune.recipe.sections import ModelSettings
from loratune.runs.report import QuantizationEffect
from loratune.runtime import is_main_process, process_count

ROWS, TOKENS = 2, 128
"""Rows, and tokens of each, that are compared."""
SECONDS = 20.0
"""A comparison that would take longer is left out."""
TRIED_SECONDS = 1.0
"""After this time it is estimated how long the comparison takes."""
POSITIONS_AT_ONCE = 32
NOTICED = 0.1
"""Mean KL in nats above which there is advice: the scale of what a fine-tune changes."""

NOT_MEASURED_SHARDED = "how far {} is from 16 bits is measured only with model.sharding none"


@dataclass(frozen=True)
class BaseWeights:
    """What is known of a base's weights before training."""

    groups: dict[str, int]
    """Group → bytes."""
    own_bytes: int
    """What this process holds; less than all of a sharded base."""
    effect: QuantizationEffect | None = None
    """Of quantisation; None if there is none, or if it could not be measured."""
    notes: tuple[str, ...] = ()
    """Advice on the quantisation, or why its effect is not known."""
    shares: int = 1
    """Number of processes that the base is sharded over; 1 if each has all of it."""
    norms: dict[str, float] = field(default_factory=dict)
    """Parameter → Frobenius norm, of a sharded base; no process can tell it alone later."""


class TooSlowError(Exception):
    """The comparison would take too long."""


def weights_of(model: CausalModel, settings: ModelSettings, folder: Path, data: PreparedData) -> BaseWeights:
    """Return the memory of a base's weights, and the effect of their quantisation.

    Args:
        model: the base without an adapter.
        settings: the recipe's model section.
        folder: the base's folder.
        data: whose validation rows are compared, or training rows if there are none.
    """
    groups, held = bytes_by_group(model), sum(own_bytes(parameter) for parameter in model.parameters())
    if is_sharded(model):
        unknown = () if settings.quantization == "none" else (NOT_MEASURED_SHARDED.format(settings.quantization),)
        return BaseWeights(groups, held, None, unknown, process_count(), base_norms(model))
    if settings.quantization == "none":
        return BaseWeights(groups, held)
    notes = []
    if settings.quantization == "int8" and (stacks := expert_stacks(model)):
        size = sum(held_bytes(parameter) for name, parameter in model.named_parameters() if name in stacks)
        notes.append(
            f"model.quantization int8 leaves {console.memory(size)} of the base as they are: the "
            f"{counted(len(stacks), 'stack')} of matrices of its mixture, which nf4 quantises"
        )
    try:
        compared = data.validation or data.train
        effect = measure_effect(model, folder, compared, SECONDS) if is_main_process() else None
    except Exception as error:  # a measurement is no reason to end a run
        notes.append(f"how far {settings.quantization} is from 16 bits was not measured: {reason_of(error)}")
        return BaseWeights(groups, held, None, tuple(notes))
    advice = advice_on(model, settings.quantization, effect) if effect else []
    return BaseWeights(groups, held, effect, (*notes, *advice))


def measure_effect(model: CausalModel, folder: Path, split: Split, seconds: float) -> QuantizationEffect:
    """Run a base with its quantised weights and with those of its files, which are read one matrix at a time.

    Args:
        model: a quantised base without an adapter; it is not changed.
        folder: the base's folder.
        split: the two longest rows of it are compared, shortened to one length.
        seconds: limit of the run with the files' weights.

    Raises:
        TooSlowError: it would take longer.
    """
    keep_unpacked(model)
    chosen = split.lengths.argsort()[::-1][:ROWS].tolist()
    rows = [row["input_ids"] for row in as_dataset(split).select(chosen)]
    length = min(TOKENS, *map(len, rows))
    ids = torch.tensor([row[:length] for row in rows], device=model.device)
    started, done = time.monotonic(), 0

    def advance(read: int, total: int) -> None:
        nonlocal done
        done += read
        passed = time.monotonic() - started
        if passed > TRIED_SECONDS and passed * total / done > seconds:
            raise TooSlowError(f"it would take about {passed * total / done:.0f} s")

    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            head, decoder = head_of(model), decoder_of(model)
            with unquantised(model, folder, advance):
                expected = decoder(input_ids=ids, use_cache=False).last_hidden_state
            found = decoder(input_ids=ids, use_cache=False).last_hidden_state
            return _compared(expected.flatten(0, 1), found.flatten(0, 1), head)
    finally:
        model.train(was_training)


def advice_on(model: CausalModel, quantization: str, effect: QuantizationEffect) -> list[str]:
    """Return advice if quantisation costs much, or if models with such layers are known to lose much by it."""
    has_states = any(recurrent_modules(decoder_of(model)))
    if effect.mean_kl <= NOTICED and not (has_states and quantization == "nf4"):
        return []
    known = "; its recurrent layers are known to lose more by 4 bits than others" if has_states else ""
    closer = "int8 is closer, and none is exact" if quantization == "nf4" else "none is exact"
    return [
        f"model.quantization {quantization}: the base's predictions are {effect.mean_kl:.2g} nats from those in 16 "
        f"bits (mean KL), and {1 - effect.top1_agreement:.0%} of its likeliest tokens are others{known}; {closer}"
    ]


def _compared(expected: torch.Tensor, found: torch.Tensor, head: Any) -> QuantizationEffect:
    """Compare what a head, which is not quantised, makes of hidden states (positions, width).

    Logits are made some positions at a time: those of all would take more than the quantised base of a small model.
    """
    kl, same = 0.0, 0
    for one, other in zip(expected.split(POSITIONS_AT_ONCE), found.split(POSITIONS_AT_ONCE), strict=True):
        wanted, given = (head(states).float().log_softmax(-1) for states in (one, other))
        kl += float(functional.kl_div(given, wanted, reduction="sum", log_target=True))
        same += int((wanted.argmax(-1) == given.argmax(-1)).sum())
    return QuantizationEffect(len(expected), kl / len(expected), same / len(expected))
