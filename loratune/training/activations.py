"""Decides how many tokens go through the model at once, and whether their activations are recomputed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.tensor import DTensor

from loratune import console
from loratune.model.adapter.summary import TRAINED_BYTES
from loratune.model.adapter.targets import computes_stacks
from loratune.model.architecture.structure import causal_model, decoder_of, text_config
from loratune.model.hardware import Hardware
from loratune.model.kernels.linear_cross_entropy import CHUNK_BYTES
from loratune.model.memory import free_memory_bytes
from loratune.model.sharding.gathering import gathered_bytes
from loratune.protocols import AdaptedModel
from loratune.recipe.sections import TrainingSettings
from loratune.training.probes.passes import packed, padded
from loratune.training.processes.group import from_all

SAMPLE_TOKENS = 256
"""Long enough that memory independent of the number of tokens hardly counts."""
SPARE = 1.2
"""Factor for gradients in flight, compiled kernels and allocator overhead on top of activations on a CPU.

They are those of an allocator that returns freed blocks, which is set where keeping them would take too much.
"""
SPARE_ON_GPU = 1.1
"""The same on a GPU, where the peak of whole passes is measured: rounding and fragmentation of the allocator."""
EFFICIENT_TOKENS = {"cuda": 2048, "cpu": 256}
"""A pass with fewer tokens is hardly faster: the time goes into launches and into reading the weights."""
MOST_TOKENS = {"cuda": 16_384, "cpu": 2048}
"""A pass with more tokens is not faster."""
MASKED_TOKENS = 1024
"""The same for rows with a mask, where attention takes time and memory by the square of the tokens."""


@dataclass(frozen=True)
class PassMemory:
    """Memory of a forward and backward pass in addition to the model's weights, in bytes."""

    kept: float
    """Per token."""
    recomputed: float
    """Per token with gradient checkpointing."""
    fixed: int
    """Gradients, optimizer state and logits."""
    free: int
    """Free memory."""

    def needed(self, tokens: int, is_recomputed: bool) -> int:
        """Return the bytes of a pass."""
        return self.fixed + round(tokens * (self.recomputed if is_recomputed else self.kept))

    def fitting(self, is_recomputed: bool) -> int:
        """Return the number of tokens that fit into the free memory; 0 or less if none do."""
        return int((self.free - self.fixed) / (self.recomputed if is_recomputed else self.kept))


@dataclass(frozen=True)
class PassPlan:
    """How a run's steps go through the model."""

    tokens: int
    """Maximum tokens of a pass."""
    largest: int
    """Bound of the tokens of the largest pass: that of a whole step, where `tokens` is more."""
    gradient_checkpointing: bool
    memory: PassMemory | None
    """As measured; None where the recipe leaves nothing to decide."""

    def __str__(self) -> str:
        """Return the memory of the largest pass, and the decision."""
        text = f"passes of up to {self.largest:,} tokens"
        if self.memory:
            needed = console.memory(self.memory.needed(self.largest, self.gradient_checkpointing))
            text += f", about {needed} of {console.memory(self.memory.free)} free"
        return f"{text}: gradient checkpointing" if self.gradient_checkpointing else text


def largest_step(lengths: NDArray[np.int64], training: TrainingSettings, processes: int) -> int:
    """Return a bound of one process's tokens in a step: those of a step of the longest rows, padding included."""
    longest_first = -np.sort(-lengths)[: training.batch_size]
    longest, tokens = int(longest_first[0]), int(longest_first.sum())
    most = tokens if processes == 1 else longest + tokens // processes  # see `spread`
    if training.packing:
        return most
    return longest * min(len(longest_first), most // max(1, int(lengths.min())))


def plan_passes(
    training: TrainingSettings,
    memory: PassMemory | None,
    longest: int,
    step: int,
    device: str,
    begun: int | None = None,
) -> PassPlan:
    """Choose the tokens of a pass and gradient checkpointing, where the recipe leaves them open.

    Activations are recomputed if a pass that is large enough to be fast does not fit otherwise. The number of tokens is
    a power of two, so that runs on machines with similar memory have the same passes.

    Args:
        training: the settings.
        memory: memory of a pass; None if both are set.
        longest: tokens of the longest row.
        step: tokens of the largest step of one process.
        device: type of the device.
        begun: maximum tokens of a pass before the run was interrupted, or of a row with a mask; kept if it fits.
    """
    wanted = training.tokens_per_pass or begun
    least = max(longest, min(step, wanted or EFFICIENT_TOKENS[device]))
    modes = [False, True] if training.gradient_checkpointing is None else [training.gradient_checkpointing]
    is_recomputed = next((mode for mode in modes if memory is None or memory.fitting(mode) >= least), modes[-1])
    tokens = wanted or MOST_TOKENS[device]
    if memory is not None and not training.tokens_per_pass:
        tokens = min(tokens, 1 << max(0, memory.fitting(is_recomputed)).bit_length() >> 1)
    tokens = max(tokens, longest)
    return PassPlan(tokens, max(longest, min(tokens, step)), is_recomputed, memory)


def measure_passes(model: AdaptedModel, is_packed: bool, longest: int, step: int, hardware: Hardware) -> PassMemory:
    """Have the model show on short documents what it keeps for each token.

    Args:
        model: a PEFT model on its device.
        is_packed: whether passes are packed or padded.
        longest: tokens of the longest document.
        step: tokens of the largest step of one process.
        hardware: the device of the model.
    """
    base = causal_model(model)
    config = text_config(base.config)
    length = min(longest, SAMPLE_TOKENS)
    layers, has_copies = config.num_hidden_layers, computes_stacks(model)
    was_training = model.training
    model.train()
    with torch.random.fork_rng([hardware.device] if hardware.is_gpu else []):
        if hardware.is_gpu:
            with _recomputed(base) if has_copies else nullcontext():  # those of all layers may not fit
                few, many = (_peak_bytes(model, is_packed, [length] * count, hardware) for count in (1, 4))
            kept = SPARE_ON_GPU * (many - few) / (3 * length)
            fixed = round(max(0, few - kept * length))
        else:
            counts = (1, 4) if has_copies else (1,)
            few, *more = (_kept_bytes(model, is_packed, [length] * count) for count in counts)
            per_token = (more[0] - few) / (3 * length) if more else few / length
            kept = SPARE * per_token
            fixed = logits_bytes(step, config.vocab_size, base.dtype)
            fixed += round(2 * (few - per_token * length) / layers)  # a layer's copies of experts, and their gradients
            fixed += gathered_bytes(model)
    model.train(was_training)
    # AdamW's two averages and the gradients each have the size of the weights in float32. Weights that become float32
    # need as much once more: what they grow by, and the copy that autocast rounds.
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    fixed += sum((3 + (weight.element_size() < TRAINED_BYTES)) * TRAINED_BYTES * weight.numel() for weight in trained)
    # The input of each layer is kept, and all of one layer while its gradients are computed.
    recomputed = layers * config.hidden_size * base.dtype.itemsize + kept / layers
    if hardware.is_gpu and has_copies:  # measured so
        recomputed = kept
    return _scarcest(PassMemory(kept, min(kept, recomputed), fixed, free_memory_bytes(hardware)))


def logits_bytes(step: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Return what logits and their gradients take at most, a chunk at a time, of a step's tokens."""
    whole: int = step * vocabulary * dtype.itemsize
    return 2 * min(CHUNK_BYTES, whole)


@contextmanager
def _recomputed(model: Any) -> Iterator[None]:
    """Have a model recompute its activations."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


def _kept_bytes(model: AdaptedModel, is_packed: bool, lengths: Sequence[int]) -> int:
    """Return what the forward pass of the decoder saves for the backward pass."""
    inputs = _sample(model, is_packed, lengths)
    del inputs["labels"]
    held = (tensor for tensor in (*model.parameters(), *model.buffers()) if not isinstance(tensor, DTensor))
    known = {tensor.untyped_storage().data_ptr() for tensor in held}
    saved: list[torch.UntypedStorage] = []

    def note(tensor: torch.Tensor) -> None:
        # The tensor itself, given back, would belong to the graph that keeps it, and neither would ever be freed.
        saved.append(tensor.untyped_storage())

    with torch.autograd.graph.saved_tensors_hooks(note, lambda _: None):
        states = decoder_of(causal_model(model))(**inputs, use_cache=False)
    # Only now, while the graph keeps them: gathered weights that were saved have no bytes any more.
    sizes = {storage.data_ptr(): storage.nbytes() for storage in saved if storage.data_ptr() not in known}
    del states
    return sum(sizes.values())


def _peak_bytes(model: AdaptedModel, is_packed: bool, lengths: Sequence[int], hardware: Hardware) -> int:
    """Return how much a forward and backward pass adds to the allocated memory of the GPU at its peak."""
    inputs = _sample(model, is_packed, lengths)
    torch.cuda.reset_peak_memory_stats(hardware.device)
    before = torch.cuda.memory_allocated(hardware.device)
    model(**inputs, summed_loss=True).loss_sum.backward()
    peak = torch.cuda.max_memory_allocated(hardware.device) - before
    for parameter in model.parameters():
        parameter.grad = None
    return int(peak)


def _sample(model: AdaptedModel, is_packed: bool, lengths: Sequence[int]) -> dict[str, Any]:
    return (packed if is_packed else padded)(model, [[0] * length for length in lengths])


def _scarcest(memory: PassMemory) -> PassMemory:
    """Return the worst figures of all processes: only with the same ones do they divide a step alike."""
    of_all = from_all(memory)
    return PassMemory(
        max(one.kept for one in of_all),
        max(one.recomputed for one in of_all),
        max(one.fixed for one in of_all),
        min(one.free for one in of_all),
    )
