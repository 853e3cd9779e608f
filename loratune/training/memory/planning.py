"""Plans the memory of a recipe without weights: what it takes, whether it fits, and what would make it fit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

import loratune.training.run  # noqa: F401  # what a run has imported is in memory
from loratune.errors import counted
from loratune.model.config import load_config
from loratune.model.files import find_config
from loratune.model.hardware import Hardware, detect_hardware
from loratune.model.memory import free_main_memory_bytes, resident_bytes
from loratune.model.tokenizer import load_tokenizer
from loratune.recipe.sections import Recipe
from loratune.training.activations import MASKED_TOKENS, PassPlan, largest_step, plan_passes
from loratune.training.gate import TEMPLATE, pass_gate
from loratune.training.memory.expecting import (
    CONTEXT_BYTES,
    ProcessMemory,
    Workload,
    expect_passes,
    pass_memory,
    settings_of,
)
from loratune.training.memory.planned import PlannedModel, planned_model
from loratune.training.memory.prediction import Prediction

NOT_YET = {"cuda": ("no prediction has been compared with a run on a GPU yet",)}
"""Kind of device → what is to be known of its predictions."""
FLASH = (8, 0)
"""Compute capability that is assumed of a GPU that is not there."""


@dataclass(frozen=True)
class Place:
    """Where a run would take place."""

    hardware: Hardware
    room_bytes: int
    """Memory of one GPU, or what this machine has free for each process."""
    name: str


def place_of(card: tuple[str, int] | None, gpus: int | None) -> Place:
    """Return where a run would take place: on GPUs of a size, or on this machine.

    Args:
        card: memory of a card, as the user has written it and in bytes; None for this machine.
        gpus: number of processes, each with a card.
    """
    count = gpus or 1
    if card is not None:
        written, size_bytes = card
        name = f"{count} × {written}" if count > 1 else f"a GPU of {written}"
        return Place(Hardware(torch.device("cuda", 0), True, name, count, FLASH), size_bytes, name)
    hardware = replace(detect_hardware(), processes=count)
    if hardware.is_gpu:
        free, _ = torch.cuda.mem_get_info()
        return Place(hardware, int(free) + CONTEXT_BYTES, hardware.name)
    return Place(hardware, free_main_memory_bytes() // count + resident_bytes(), "this machine")


class Planner:
    """Predicts the memory of a recipe and of variations of it.

    Args:
        recipe: the recipe.
        place: where it would run.

    Raises:
        LoratuneError: base, rows or settings are not usable; as `sft` says it.
    """

    def __init__(self, recipe: Recipe, place: Place) -> None:
        self.place = place
        self._folder, has_tokenizer = find_config(recipe.model)
        self.config = load_config(self._folder)
        self._models: dict[str, PlannedModel] = {}
        self.work, self.notes = _encoded(recipe) if has_tokenizer else _assumed(recipe)
        self._tokenizer = load_tokenizer(self._folder) if has_tokenizer else None
        self._process = resident_bytes()  # with tokenizer and what reads rows, as in a run

    def predict(self, recipe: Recipe) -> Prediction:
        """Predict the memory of the recipe, or of one that differs in settings of model, adapter or training."""
        planned = self._planned(recipe)
        work = Workload(np.minimum(self.work.lengths, recipe.training.max_length), self.work.trained)
        passes = self._passes(planned, recipe, work)
        memory = ProcessMemory(self._process, self.place.room_bytes)
        expected = expect_passes(planned, recipe, work, self.place.hardware, passes, memory)
        return replace(expected, notes=(*self.notes, *NOT_YET.get(self.place.hardware.device.type, ())))

    def _planned(self, recipe: Recipe) -> PlannedModel:
        shaping = {"method", "model", "lora", "freeze"}
        key = recipe.model_dump_json(include=shaping) + str(recipe.training.packing)
        if key not in self._models:
            self._models[key] = planned_model(recipe, self._folder, self.place.hardware)
        return self._models[key]

    def _passes(self, planned: PlannedModel, recipe: Recipe, work: Workload) -> PassPlan:
        hardware, training = self.place.hardware, settings_of(recipe, planned.is_packed)
        held = sum(planned.weights.values()) + planned.adapter_bytes
        held += CONTEXT_BYTES if hardware.is_gpu else self._process
        memory = None
        if training.gradient_checkpointing is None or training.tokens_per_pass is None:
            memory = pass_memory(planned, recipe, work, hardware, self.place.room_bytes - held)
        step = largest_step(work.lengths, training, hardware.processes)
        wanted = MASKED_TOKENS if planned.is_masked else None
        return plan_passes(training, memory, work.longest, step, str(hardware.device.type), wanted)


def _encoded(recipe: Recipe) -> tuple[Workload, tuple[str, ...]]:
    """Return the rows of the recipe, and warnings about the template that they are rendered with."""
    data = pass_gate(recipe).checked()
    notes = tuple(one.text for one in data.found if one.name == TEMPLATE and one.level == "warn")
    return Workload(data.train.lengths, data.train.trained_tokens / data.train.tokens), notes


def _assumed(recipe: Recipe) -> tuple[Workload, tuple[str, ...]]:
    """Return rows of the largest length, where there is no tokenizer to encode those of the recipe."""
    longest = recipe.training.max_length
    lengths = np.full(recipe.training.batch_size, longest, dtype=np.int64)
    tokens = counted(longest, "token")
    return Workload(lengths, 1.0), (f"there is no tokenizer beside the config: every row is taken to have {tokens}",)
