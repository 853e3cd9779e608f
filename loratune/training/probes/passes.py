"""Short passes through a model that leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from loratune.data.assembly.batches import collate_packed, collate_padded
from loratune.model.architecture.structure import causal_model, decoder_of, text_config
from loratune.model.weights.dequantised import inputs_unrounded
from loratune.protocols import AdaptedModel

LARGEST_SHARES = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest difference by rounding, as a share of the difference that a fault would cause.

In half precision, rounding may send a token to another expert.
"""
ALONE_SHARES = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.5}
"""The same where shapes differ, as the norm of a difference: other kernels may send tokens to other experts."""
Documents = Sequence[Sequence[int]]


@contextmanager
def undisturbed(model: AdaptedModel) -> Iterator[None]:
    """Compute without dropout; afterwards modes, gradients and random state are as before."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def random_documents(model: AdaptedModel, lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Return documents of random tokens.

    Args:
        model: determines the vocabulary.
        lengths: tokens of each document.
        seed: the same seed gives the same documents.
    """
    generator = torch.Generator().manual_seed(seed)
    size = text_config(causal_model(model).config).vocab_size
    return [torch.randint(size, (length,), generator=generator).tolist() for length in lengths]


def packed(model: AdaptedModel, documents: Documents) -> dict[str, Any]:
    """Return a packed pass of documents on the model's device, with labels."""
    return _on_device(model, collate_packed(as_rows(documents)))


def padded(model: AdaptedModel, documents: Documents, pad_token_id: int = 0) -> dict[str, Any]:
    """Return a padded pass of documents on the model's device, with labels."""
    return _on_device(model, collate_padded(as_rows(documents), pad_token_id))


def single(model: AdaptedModel, documents: Documents) -> dict[str, Any]:
    """Return a pass of documents of one length on the model's device, without padding, boundaries or labels."""
    return {"input_ids": torch.tensor([*map(list, documents)], device=model.device)}


def last_states(model: AdaptedModel, inputs: dict[str, Any]) -> torch.Tensor:
    """Return the decoder's last states of a pass, float32 [rows, length, width], without gradients.

    Layers with LLM.int8 compute with their inputs unrounded. They would round those of a token by all tokens of a pass,
    so that each changes the others a little however a model attends.
    """
    given = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad(), inputs_unrounded(model):
        states: torch.Tensor = decoder_of(model)(**given, use_cache=False).last_hidden_state
    return states.float()


def largest(states: torch.Tensor) -> float:
    """Return the largest absolute value; infinity if some are not finite."""
    value = float(states.abs().max())
    return value if value == value else float("inf")


def as_rows(documents: Documents) -> list[dict[str, Any]]:
    """Return documents as the data loader reads rows, with labels at all tokens."""
    return [{"input_ids": list(ids), "labels": list(ids), "sequence": 0} for ids in documents]


def _on_device(model: AdaptedModel, batch: dict[str, Any]) -> dict[str, Any]:
    del batch["about"]
    return {name: value.to(model.device) if hasattr(value, "to") else value for name, value in batch.items()}
