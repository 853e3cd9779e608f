"""Whether what a forward pass keeps for the backward pass fits in memory, or is computed a second time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from loratune import console
from loratune.data.batches import collate_packed
from loratune.model.hardware import Hardware
from loratune.model.memory import free_memory_bytes

SAMPLE_TOKENS = 256
"""Enough that what does not grow with the tokens hardly counts."""
SPARE = 1.3
"""What the backward pass has in hand at a time, and memory between pieces in use, come on top."""


@dataclass(frozen=True)
class Activations:
    """Bytes that a training step keeps, beside those that are there for it."""

    tokens: int
    """Of the largest batch."""
    needed_bytes: int
    """With gradients and optimizer state."""
    free_bytes: int

    @property
    def fit(self) -> bool:
        """Whether a step can keep them."""
        return self.needed_bytes <= self.free_bytes


def measure_activations(model: Any, tokens: int, longest: int, hardware: Hardware) -> Activations:
    """Have the model show on a short document what it keeps for each token.

    Args:
        model: a PEFT model on its device.
        tokens: of the largest batch.
        longest: tokens of the longest document.
        hardware: where the model is.
    """
    length = min(longest, SAMPLE_TOKENS)
    batch = collate_packed([{"input_ids": [0] * length, "labels": [0] * length, "lengths": [length]}])
    for unused in ("labels", "filling"):
        del batch[unused]
    decoder = model.get_base_model().model
    seen = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept_bytes = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept_bytes
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept_bytes += storage.nbytes()
        return tensor

    inputs = {name: value.to(hardware.device) if hasattr(value, "to") else value for name, value in batch.items()}
    was_training = model.training
    model.train()
    # The graph holds every tensor until the end, so that no address comes twice.
    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        decoder(**inputs, use_cache=False)
    model.train(was_training)
    trained_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    # AdamW's two averages and the gradients are as large as the weights.
    needed = SPARE * kept_bytes / length * tokens + 3 * trained_bytes
    return Activations(tokens, round(needed), free_memory_bytes(hardware))


def activations_text(activations: Activations) -> str:
    """What they come to, and what is done about it."""
    text = (
        f"about {console.memory(activations.needed_bytes)} for {activations.tokens:,} tokens, "
        f"{console.memory(activations.free_bytes)} free"
    )
    return text if activations.fit else f"{text}: gradient checkpointing"
