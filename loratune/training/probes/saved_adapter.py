"""Measures whether PEFT alone gives the states of the trained model from the files that the run will save."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError

from loratune.errors import Exit, LoratuneError, bullet_list, counted, reason_of
from loratune.model.adapter.attach import save_adapter
from loratune.model.adapter.plain_copy import differing_tensors, load_by_peft, perturbed
from loratune.protocols import AdaptedModel, CausalModel
from loratune.training.probes.passes import (
    ALONE_SHARES,
    last_states,
    random_documents,
    single,
    undisturbed,
)

LENGTH = 8
SHOWN = 5


def check_saved_adapter(model: AdaptedModel, plain: CausalModel) -> str:
    """Save the adapter, with random values in it, and compare what PEFT loads from the files.

    Args:
        model: the model as it is trained.
        plain: result of `with_same_weights`; it is changed.

    Returns:
        Why this could not be checked; empty if it was.

    Raises:
        LoratuneError: tensors, scales or states differ.
    """
    inputs = single(model, random_documents(model, [LENGTH], seed=0))
    with undisturbed(model):
        without = last_states(model, inputs)
        with TemporaryDirectory() as folder, perturbed(model):
            try:
                save_adapter(model, Path(folder))
            except (OSError, SafetensorError) as failure:  # such as a full disk
                return f"{folder}: {reason_of(failure)}"
            loaded = load_by_peft(plain, Path(folder))
            own, saved = (last_states(one, inputs) for one in (model, loaded))
            different = differing_tensors(model, loaded)
    if different:
        raise _refusal(f"{counted(len(different), 'weight')} lost or changed:\n{bullet_list(different, limit=SHOWN)}")
    effect, error = float((own - without).norm()), float((own - saved).norm())
    if error > ALONE_SHARES[model.dtype] * effect:  # not where float16 overflows, which says nothing of the files
        raise _refusal(f"the states differ by {error / effect:.1%} of the adapter's effect")
    return ""


def _refusal(what: str) -> LoratuneError:
    return LoratuneError(
        f"PEFT would not load this adapter from its files as it is trained: {what}\n"
        "Other lora settings may avoid it; update peft if the model's family is new",
        Exit.MODEL,
    )
