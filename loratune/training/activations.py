"""Decides whether activations fit into memory, or gradient checkpointing recomputes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loratune import console
from loratune.data.assembly.batches import collate_packed, collate_padded
from loratune.model.architecture.structure import causal_model, decoder_of, text_config
from loratune.model.hardware import Hardware
from loratune.model.kernels.linear_cross_entropy import CHUNK_BYTES
from loratune.model.memory import free_memory_bytes
from loratune.protocols import AdaptedModel

SAMPLE_TOKENS = 256
"""Long enough that memory independent of the number of tokens hardly counts."""
SPARE = 1.6
"""Factor for gradients in flight, compiled kernels and allocator overhead on top of activations.

Qwen2.5 0.5B keeps 1.73 GB, and its resident memory grows by 3.1 GB in the first step.
"""


@dataclass(frozen=True)
class Activations:
    """Memory of a training step in addition to the model's weights."""

    tokens: int
    """Tokens of the largest batch."""
    kept_bytes: int
    """Bytes that the forward pass keeps for the backward pass."""
    needed_bytes: int
    """Total bytes, including gradients, optimizer state and the logits."""
    free_bytes: int

    @property
    def fit(self) -> bool:
        """Whether the memory is sufficient without gradient checkpointing."""
        return self.needed_bytes <= self.free_bytes


def measure_activations(
    model: AdaptedModel, tokens: int, longest: int, is_packed: bool, hardware: Hardware
) -> Activations:
    """Have the model show on a short document what it keeps for each token.

    Args:
        model: a PEFT model on its device.
        tokens: tokens of the largest batch.
        longest: tokens of the longest document.
        is_packed: whether batches are packed or padded.
        hardware: the device of the model.
    """
    length = min(longest, SAMPLE_TOKENS)
    row = {"input_ids": [0] * length, "labels": [0] * length, "lengths": [length], "sequences": [0]}
    batch = collate_packed([row]) if is_packed else collate_padded([row], pad_token_id=0)
    for unused in ("labels", "about"):
        del batch[unused]
    base = causal_model(model)
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
    # The graph keeps every tensor alive, so no address is reused.
    devices = [hardware.device] if hardware.is_gpu else []
    with torch.random.fork_rng(devices), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        decoder_of(base)(**inputs, use_cache=False)
    model.train(was_training)
    trained_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    kept_bytes = round(kept_bytes / length * tokens)
    logits_bytes = 2 * min(CHUNK_BYTES, tokens * text_config(base.config).vocab_size * base.dtype.itemsize)
    # AdamW's two averages and the gradients each have the size of the weights.
    needed = round(SPARE * kept_bytes) + logits_bytes + 3 * trained_bytes
    return Activations(tokens, kept_bytes, needed, free_memory_bytes(hardware))


def activations_text(activations: Activations) -> str:
    """Return a line with the required and the free memory, and the decision."""
    text = (
        f"about {console.memory(activations.needed_bytes)} for {activations.tokens:,} tokens, "
        f"{console.memory(activations.free_bytes)} free"
    )
    return text if activations.fit else f"{text}: gradient checkpointing"
