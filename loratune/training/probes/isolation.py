"""Measures whether the documents of a packed row see each other, and packs rows only if they do not."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from loratune.errors import counted, reason_of
from loratune.model.architecture.recurrent import recurrent_modules
from loratune.model.architecture.structure import causal_model, decoder_of
from loratune.model.kernels.attention_choice import AttentionChoice
from loratune.model.kernels.packed_rows import PackedRows
from loratune.model.memory import is_out_of_memory
from loratune.protocols import AdaptedModel, CausalModel
from loratune.training.probes.passes import (
    ALONE_SHARES,
    LARGEST_SHARES,
    largest,
    last_states,
    packed,
    random_documents,
    single,
    undisturbed,
)

LENGTHS = (21, 70, 33)
"""Tokens of the documents: linear attention has chunks of 64, and there are boundaries within one and across."""
CONTROL_TOKENS = 8
"""Tokens after the first document, where those of the document matter most."""


@dataclass(frozen=True)
class Packing:
    """How a run's rows are put into passes."""

    attention: AttentionChoice
    is_packed: bool
    is_masked: bool
    """Whether attention gets a mask of the whole row."""
    reason: str
    """Why documents are apart, or why rows are padded."""


def choose_packing(model: AdaptedModel, chosen: AttentionChoice, own: str) -> Packing:
    """Have a model keep the documents of packed rows apart, as measured.

    The chosen attention comes first, then the model's own with a mask of the row. If neither keeps documents apart,
    rows have to be padded.

    Args:
        model: with the chosen attention.
        chosen: the attention.
        own: name of the attention that the model was loaded with.
    """
    causal, failures = causal_model(model), list[str]()
    recurrent = len([*recurrent_modules(decoder_of(model))])
    told = "documents of a packed row do not see each other"
    if recurrent and _may_have_kernels(model):
        failures.append(why_not_apart(model))
        if not failures[-1]:
            return Packing(chosen, True, False, f"{told}, by kernels in {counted(recurrent, 'recurrent layer')}")
    rows = PackedRows(causal) if recurrent else None
    failures.append(why_not_apart(model))
    if not failures[-1]:
        each = f", {counted(recurrent, 'recurrent layer')} computing each by itself" if recurrent else ""
        why = f", since with the layers as they are {failures[0]}" if len(failures) > 1 else ""
        return Packing(chosen, True, False, told + each + why)
    if rows:
        rows.remove()
    plain = _without_flash(causal, own)
    causal.set_attn_implementation(plain)
    rows = PackedRows(causal, is_masked=True)
    failures.append(why_not_apart(model))
    if not failures[-1]:
        return Packing(AttentionChoice(f"{plain} with a mask", f"since {failures[-2]}"), True, True, told)
    rows.remove()
    causal.set_attn_implementation(own)
    return Packing(AttentionChoice(own, "rows are padded"), False, False, f"rows are padded, since {failures[-1]}")


def _may_have_kernels(model: AdaptedModel) -> bool:
    """Return whether recurrent layers may have kernels that take the boundaries, which are for GPUs."""
    return bool(model.device.type == "cuda")


def _without_flash(model: CausalModel, own: str) -> str:
    """Return the name of an attention that takes a mask of the row: the model's own unless it is flash attention."""
    if not own.startswith("flash"):
        return own
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


def why_not_apart(model: AdaptedModel) -> str:
    """Return why documents of a packed row are not proven to be apart; empty if they are.

    Two rows differ in their first document only. The states of the later documents must be the same in both. All shapes
    are the same, so rounding is too. As a control, the beginnings of the same rows without boundaries must give
    different states. The last document alone must have the same states too, but for rounding.
    """
    own = random_documents(model, LENGTHS, seed=0)
    other = [*random_documents(model, LENGTHS[:1], seed=1), *own[1:]]
    start, end = LENGTHS[0], sum(LENGTHS)
    begun = [[*chain.from_iterable(row)][: start + CONTROL_TOKENS] for row in (own, other)]
    with undisturbed(model):
        try:
            first, second = (last_states(model, packed(model, row))[0, start:end] for row in (own, other))
            alone = last_states(model, single(model, own[-1:]))[0]
            joined = last_states(model, single(model, begun))[:, start:]
        except Exception as error:  # an attention or a kernel may raise anything that it cannot do
            if is_out_of_memory(error):
                raise
            return f"packing fails here: {reason_of(error)}"
    leak, control = largest(first - second), largest(joined[0] - joined[1])
    if control == float("inf"):
        return "the model's states are not finite"
    if control == 0:
        return "documents do not see each other even without boundaries, so it cannot be measured that they are apart"
    if not leak <= LARGEST_SHARES[model.dtype] * control:
        return f"documents of a packed row see each other, {leak / control:.0%} as much as without boundaries"
    if not (first[-len(alone) :] - alone).norm() <= ALONE_SHARES[model.dtype] * alone.norm():
        return "a document in a packed row has other states than alone"
    return ""
