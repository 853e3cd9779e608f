"""Reads adapters for a base, and leaves the model as it is, so that another thread may run it meanwhile."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig

from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.model.adapter.completeness import require_complete
from loratune.model.adapter.files import CONFIG_FILE, SETTINGS, read_config_values
from loratune.model.adapter.fitting import side_problems
from loratune.model.adapter.other_layouts import in_peft_layout
from loratune.model.adapter.own_parameters import own_parameters, parameter_modules
from loratune.model.adapter.patterns import as_expressions, settle_patterns
from loratune.model.adapter.tensors import AdapterTensors, read_tensors
from loratune.model.architecture.structure import causal_model
from loratune.model.architecture.vocabulary import vocabulary_of
from loratune.protocols import CausalModel


@dataclass(frozen=True)
class ReadAdapter:
    """An adapter that fits the base."""

    folder: Path
    config: LoraConfig
    tensors: AdapterTensors
    """Memory-mapped."""
    vocabulary: int
    """Embedding rows of the model with it."""
    layout: str
    """Hash of its settings and of the names and shapes of its LoRA tensors."""


class AdapterReader:
    """Reads adapters for one base.

    Args:
        model: the base, with or without adapters; nothing may run it now.
    """

    def __init__(self, model: CausalModel) -> None:
        self.shapes = {name: tuple(values.shape) for name, values in own_parameters(model).base_parameters().items()}
        """Parameter name → shape, of the base."""
        self.vocabulary = self.shapes[vocabulary_of(self.shapes).embedding][0]
        """Embedding rows of the base."""
        self._is_tied = causal_model(model).config.tie_word_embeddings
        self._linear = {
            name: (module.out_features, module.in_features)
            for name, module in parameter_modules(model).items()
            if name.endswith(".weight") and hasattr(module, "in_features")
        }
        """Weights of linear layers → shape; a quantised one is kept in another."""
        self._complete: set[str] = set()
        """Layouts that have passed the check of PEFT's names, which builds all of its modules."""

    def read(self, folder: Path) -> ReadAdapter:
        """Read an adapter, in any layout that loratune reads.

        Args:
            folder: PEFT folder.

        Raises:
            LoratuneError: the adapter is damaged, not LoRA, contains NaN, or does not match the base's shapes.
        """
        problems = list[str]()
        files = in_peft_layout(folder, self.shapes)
        values = settle_patterns(read_config_values(files), self.shapes, folder)
        config = peft_config(values, folder)
        tensors = read_tensors(files, values, self.shapes, self._is_tied, problems)
        if problems := problems or side_problems(tensors, self._linear, is_whole=False):
            raise unfit(folder, problems)
        lora = {tensor: tuple(values.shape) for tensor, values in tensors.lora.items()}
        settings = {key: value for key, value in values.items() if key in SETTINGS}
        layout = hashlib.sha256(json.dumps([settings, lora], sort_keys=True).encode()).hexdigest()
        if layout not in self._complete:
            require_complete(folder, peft_config(values, folder), lora, self.shapes)
            self._complete.add(layout)
        embedding = tensors.whole.get(vocabulary_of(self.shapes).embedding)
        rows = self.vocabulary if embedding is None else len(embedding)
        return ReadAdapter(folder, config, tensors, rows, layout)


def peft_config(values: dict[str, Any], folder: Path) -> LoraConfig:
    """Return PEFT's config for the LoRA layers; `OwnParameters` handles the rest."""
    patterns = {key: as_expressions(values[key]) for key in ("rank_pattern", "alpha_pattern")}
    own = ("bias", "modules_to_save", "trainable_token_indices")
    lora = {key: value for key, value in values.items() if key in SETTINGS and key not in own}
    try:
        return LoraConfig(**(lora | patterns | {"task_type": "CAUSAL_LM", "inference_mode": True}))
    except (ValueError, TypeError) as error:
        raise LoratuneError(f"{folder / CONFIG_FILE}: {first_lines(str(error))}", Exit.MODEL) from error


def unfit(folder: Path, problems: list[str]) -> LoratuneError:
    """Return the error for an adapter that does not match the base."""
    told = bullet_list(problems, limit=5)
    return LoratuneError(f"{folder}: the adapter does not fit the base model:\n{told}", Exit.MODEL)


def first_lines(text: str, limit: int = 3) -> str:
    """Return the beginning of a library's message on one line."""
    lines = [re.sub(r"\s+", " ", line).strip() for line in text.splitlines() if line.strip()]
    return " · ".join(lines[:limit]) + (f" · … {len(lines) - limit} more" if len(lines) > limit else "")
