"""Predicts the memory of a run from its model without weights and the rows of its steps."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loratune.data.assembly.steps import PassLayout, StepSampler
from loratune.model.architecture.structure import causal_model, text_config
from loratune.model.hardware import Hardware
from loratune.recipe.method_sections import adapts_experts
from loratune.recipe.sections import Recipe, TrainingSettings
from loratune.training.activations import (
    EFFICIENT_TOKENS,
    MOST_TOKENS,
    SPARE,
    SPARE_ON_GPU,
    PassMemory,
    PassPlan,
    largest_step,
    logits_bytes,
)
from loratune.training.memory.planned import PlannedModel
from loratune.training.memory.prediction import (
    ADAPTER,
    ANSWERS,
    CACHE,
    CONTEXT,
    FILES,
    FIRST_USE,
    FRAGMENTS,
    FREED,
    GATHERED,
    GRADIENTS,
    KEPT,
    LOADING,
    LOGITS,
    OPTIMIZER,
    PROCESS,
    STATES,
    STEP,
    UPDATE,
    WORKSPACE,
    Prediction,
)
from loratune.training.memory.trace import Trace, cache_bytes, trace
from loratune.training.reporting.answers import MAX_QUESTIONS, MAX_TOKENS

LOOKED_AT = 200
"""Number of steps whose passes are looked at; fewer of many processes, each of which divides a step anew."""
CONTEXT_BYTES = 500_000_000
"""Of CUDA and cuBLAS beside the allocator; assumed, since it depends on driver and card."""

FRAGMENTED = 0.1
"""Of what comes and goes on a GPU, on top: rounding and fragmentation of the allocator."""
KEPT_FREED = 0.4
"""Of a pass without its logits, on top, where freed blocks are kept: tensors of later passes do not fit into all."""
KEPT_FREED_QUANTISED = {False: 0.5, True: 0.9}
"""The same beside a quantised base, by whether passes have many sizes.

Its products make 16-bit weights again and again, which come to lie between the others.
"""
FIRST_USE_BYTES = 200_000_000
"""Of libraries on a CPU: 256 kernels of 16-bit products, 0.67 MB each, and what others take at their first use."""
SMALL, BLOCK = 4096, 256
"""Values of a tensor from which bitsandbytes has its state in 8 bits, and of a block with a scale."""


@dataclass(frozen=True)
class Workload:
    """The rows that a run trains on."""

    lengths: NDArray[np.int64]
    """Tokens of each row."""
    trained: float
    """Share of the tokens with labels."""

    @property
    def longest(self) -> int:
        return int(self.lengths.max())


@dataclass(frozen=True)
class _Passes:
    """The passes of a run's first steps, each as the lengths of its rows."""

    tokens: Counter[tuple[int, ...]]
    """With padding."""
    pairs: Counter[tuple[int, ...]]
    """Of tokens that may attend to each other."""
    is_repeated: bool
    """Whether a step has several."""

    @property
    def largest(self) -> set[tuple[int, ...]]:
        """The passes that may take most."""
        return {self.tokens.most_common(1)[0][0], self.pairs.most_common(1)[0][0]}

    @property
    def have_many_sizes(self) -> bool:
        """Whether there are more than two, in eighths of the largest."""
        most = max(self.tokens.values())
        return len({round(8 * size / most) for size in self.tokens.values()}) > 2


@dataclass(frozen=True)
class ProcessMemory:
    """Main memory of a process, in bytes."""

    before: int
    """Resident before it loads the model: interpreter and libraries."""
    room: int
    """What it may take in all."""


def settings_of(recipe: Recipe, is_packed: bool) -> TrainingSettings:
    """Return the settings with which a model is trained whose rows are found to be packed or not."""
    changes: dict[str, Any] = {"packing": is_packed}
    if adapts_experts(recipe.lora) and recipe.training.gradient_checkpointing is None:
        # The changed matrices of all experts would be kept until the backward pass otherwise.
        changes["gradient_checkpointing"] = True
    return recipe.training.model_copy(update=changes)


def pass_memory(planned: PlannedModel, recipe: Recipe, work: Workload, hardware: Hardware, room: int) -> PassMemory:
    """Return what a token takes, by passes of one and of four of the longest rows.

    The margin is that of `measure_passes`: what kernels at work take is in no trace.

    Args:
        planned: the recipe's model.
        recipe: the recipe.
        work: the rows.
        hardware: that it runs on.
        room: bytes that there are beside the base and the adapter.
    """
    decided = settings_of(recipe, planned.is_packed).gradient_checkpointing
    beside = optimizer_bytes(planned, recipe, hardware) + planned.gathered_bytes
    spare = SPARE_ON_GPU if hardware.is_gpu else SPARE
    kept, fixed = _slope(planned, work.longest, bool(decided))
    step, base = largest_step(work.lengths, recipe.training, hardware.processes), causal_model(planned.model)
    beside += 0 if hardware.is_gpu else logits_bytes(step, text_config(base.config).vocab_size, base.dtype)
    found = PassMemory(spare * kept, spare * kept, round(spare * fixed) + beside, room)
    if decided is not None or found.fitting(False) >= min(step, MOST_TOKENS[hardware.device.type]):
        return found  # recomputing would take less, which nobody asks for
    recomputed, more = _slope(planned, work.longest, True)
    return PassMemory(found.kept, spare * min(kept, recomputed), round(spare * max(fixed, more)) + beside, room)


def _slope(planned: PlannedModel, longest: int, is_recomputed: bool) -> tuple[float, int]:
    """Return what a pass takes for each token, and what it takes of however many, in bytes."""
    setting = planned.setting(is_recomputed, is_repeated=True)
    few, many = (trace(planned.model, planned.batch([longest] * count, 1), setting).peak for count in (1, 4))
    slope = max(1.0, (many - few) / (3 * longest))
    return slope, round(few - slope * longest)


def expect_passes(
    planned: PlannedModel,
    recipe: Recipe,
    work: Workload,
    hardware: Hardware,
    passes: PassPlan,
    memory: ProcessMemory,
) -> Prediction:
    """Predict the memory of a process whose passes are settled.

    On a CPU, freed blocks are kept for reuse where there is room for that, unless weights are gathered or activations
    recomputed: what is made again and again leaves more gaps.

    Args:
        planned: the recipe's model.
        recipe: the recipe.
        work: the rows.
        hardware: that it runs on.
        passes: as settled.
        memory: of the process.
    """
    looked = _look(planned, recipe, work, hardware, passes)
    found, tokens = _largest(planned, work, passes, looked)
    trained, optimizer = planned.adapter_bytes, optimizer_bytes(planned, recipe, hardware)
    moments = {STEP: _step_terms(found, trained), UPDATE: _update_terms(planned, hardware)}
    if recipe.evaluation.questions_share:
        keys, states = cache_bytes(planned.model, MAX_QUESTIONS, work.longest + MAX_TOKENS)
        moments[ANSWERS] = {CACHE: keys, STATES: states}
    is_quantised = recipe.model.quantization != "none"
    share = KEPT_FREED_QUANTISED[looked.have_many_sizes] if is_quantised else KEPT_FREED
    freed = round(share * (sum(moments[STEP].values()) - moments[STEP][LOGITS]))
    for terms in moments.values():
        terms[FRAGMENTS] = round(FRAGMENTED * sum(terms.values())) if hardware.is_gpu else 0
        terms |= {ADAPTER: trained, OPTIMIZER: optimizer, GATHERED: planned.gathered_bytes}
        terms[FIRST_USE] = 0 if hardware.is_gpu else FIRST_USE_BYTES
    beside = {CONTEXT: CONTEXT_BYTES} if hardware.is_gpu else {PROCESS: memory.before}
    if not hardware.is_gpu:
        moments[LOADING] = {FILES: planned.file_bytes}
    expected = Prediction(
        planned.weights, beside, moments, tokens, passes.gradient_checkpointing, hardware.processes,
        str(hardware.device.type),
    )  # fmt: skip
    if hardware.is_gpu or planned.gathered_bytes or passes.gradient_checkpointing:
        return expected
    faster = replace(expected, moments=moments | {STEP: moments[STEP] | {FREED: freed}}, keeps_freed=True)
    return faster if faster.peak_bytes <= memory.room else expected


def _step_terms(found: Trace, trained: int) -> dict[str, int]:
    """Return the terms of a pass at its peak."""
    rest = found.peak - min(found.kept, found.peak)
    gradients = min(found.before, trained)
    terms = {GRADIENTS: gradients, KEPT: found.peak - rest - gradients, LOGITS: 0, WORKSPACE: 0}
    terms[LOGITS if found.loss == found.peak else WORKSPACE] = rest
    return terms


def _update_terms(planned: PlannedModel, hardware: Hardware) -> dict[str, int]:
    """Return the terms of the update: on a CPU AdamW makes two temporary tensors of each weight's size."""
    largest = max(weight.numel() for weight in planned.model.parameters() if weight.requires_grad)
    return {GRADIENTS: planned.adapter_bytes, WORKSPACE: 0 if hardware.is_gpu else 2 * 4 * largest}


def _look(planned: PlannedModel, recipe: Recipe, work: Workload, hardware: Hardware, passes: PassPlan) -> _Passes:
    """Return the passes of the run's first steps."""
    kind = str(hardware.device.type)
    tokens, pairs, is_repeated = Counter[tuple[int, ...]](), Counter[tuple[int, ...]](), False
    steps = min(recipe.training.max_steps or LOOKED_AT, LOOKED_AT, max(1, 4 * LOOKED_AT // hardware.processes))
    for process in range(hardware.processes):
        layout = PassLayout(
            passes.tokens, EFFICIENT_TOKENS[kind], planned.is_packed, hardware.processes, process, False
        )
        sampler = StepSampler(work.lengths, recipe.training.batch_size, recipe.seed, layout)
        for step in islice(sampler, steps):
            is_repeated |= len(step) > 1
            for rows in step:
                lengths = tuple(int(work.lengths[row]) for row in rows) or (1,)
                padded = len(lengths) * max(lengths)
                tokens[lengths] = sum(lengths) if planned.is_packed else padded
                pairs[lengths] = sum(length**2 for length in lengths)
    return _Passes(tokens, pairs, is_repeated)


def _largest(planned: PlannedModel, work: Workload, passes: PassPlan, looked: _Passes) -> tuple[Trace, int]:
    """Run the passes that may take most; return the one that does, and its tokens."""
    setting = planned.setting(passes.gradient_checkpointing, looked.is_repeated)
    traced = []
    for lengths in looked.largest:
        batch = planned.batch(list(lengths), work.trained)
        traced.append((trace(planned.model, batch, setting), int(batch["input_ids"].numel())))
    return max(traced, key=lambda pair: pair[0].peak)


def optimizer_bytes(planned: PlannedModel, recipe: Recipe, hardware: Hardware) -> int:
    """Return the bytes of AdamW's two averages of what is trained."""
    sizes = [int(weight.numel()) for weight in planned.model.parameters() if weight.requires_grad]
    name = recipe.training.optimizer
    if "8bit" not in name or (name.startswith("paged") and not hardware.is_gpu):
        return 8 * sum(sizes)
    # bitsandbytes keeps those of small tensors in float32, and a scale for each block of the others.
    return sum(8 * size if size < SMALL else 2 * size + 2 * 4 * -(-size // BLOCK) for size in sizes)
