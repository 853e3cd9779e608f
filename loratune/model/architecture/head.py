"""Determines how a model computes logits from hidden states, by running it on a few tokens."""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from loratune.errors import Exit, LoratuneError
from loratune.model.architecture.structure import decoder_of, output_layer
from loratune.model.sharding.gathering import without_hooks
from loratune.protocols import CausalModel

PROBED_TOKENS = 8
"""Enough to observe the computation."""


class _States(BaseModelOutputWithPast):
    """A decoder's output that has only states; what a family's decoder returns besides them is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class OwnHead:
    """Computes logits from hidden states with the model's own forward, which may scale or cap them.

    Args:
        model: the causal language model.
    """

    def __init__(self, model: CausalModel) -> None:
        self._model, self._forward = model, model.forward

    @property
    def weight(self) -> Any:
        return output_layer(self._model).weight

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return logits [positions, vocabulary] of hidden states [positions, width]."""
        decoder: Any = decoder_of(self._model)
        taken_over = vars(decoder).get("forward")
        decoder.forward = lambda *_, **__: _States(last_hidden_state=states[None])
        try:
            # Any ids: some models look them up before their decoder, and cannot do without.
            ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
            with without_hooks(decoder):  # a sharded one would gather weights that are not used
                logits: torch.Tensor = self._forward(input_ids=ids, use_cache=False).logits[0]
        finally:
            del decoder.forward
            if taken_over is not None:
                decoder.forward = taken_over
        return logits


def head_of(model: CausalModel) -> Any:
    """What makes logits of a decoder's states: the head's layer if the model, run on a few tokens, does nothing else.

    Raises:
        LoratuneError: the logits do not follow from the hidden states.
    """
    head = output_layer(model)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            seen = _seen(model)
            if _are_same(seen.get("given"), seen["states"]) and _are_same(seen["made"], seen["logits"]):
                return head
            own = OwnHead(model)
            if _are_same(own(seen["states"][0])[None], seen["logits"]):
                return own
    finally:
        model.train(was_training)
    raise LoratuneError(
        f"{type(model).__name__}: its logits do not follow from its decoder's last states alone, so its loss cannot be "
        "computed on labelled positions only; loratune cannot train it",
        Exit.MODEL,
    )


def head_by_identity(model: CausalModel) -> Any:
    """Return the same for a model without values: its head's layer if states and logits are not computed with further.

    Args:
        model: run under a mode that makes tensors without values.
    """
    with torch.no_grad():
        seen = _seen(model)
    pairs = (("given", "states"), ("made", "logits"))
    are_same = all(name in seen and _share_memory(seen[name], seen[other]) for name, other in pairs)
    return output_layer(model) if are_same else OwnHead(model)


def _seen(model: CausalModel) -> dict[str, torch.Tensor]:
    """Return what decoder and head get and make in a pass of a few tokens."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        decoder_of(model).register_forward_hook(lambda _, __, output: seen.update(states=output.last_hidden_state)),
        output_layer(model).register_forward_hook(lambda _, inputs, output: seen.update(given=inputs[0], made=output)),
    ]
    try:
        ids = torch.arange(PROBED_TOKENS, device=model.device)[None]
        return seen | {"logits": model(input_ids=ids, use_cache=False).logits}
    finally:
        for hook in hooks:
            hook.remove()


def _share_memory(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(tensor.untyped_storage()._cdata == other.untyped_storage()._cdata)


def _are_same(tensor: torch.Tensor | None, other: torch.Tensor) -> bool:
    """Return whether tensors are equal bit for bit, after conversion to one dtype; NaN equals NaN."""
    if tensor is None or tensor.shape != other.shape:
        return False
    return bool(torch.allclose(tensor.to(other.dtype), other, rtol=0, atol=0, equal_nan=True))
