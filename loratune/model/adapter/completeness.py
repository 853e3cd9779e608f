"""Whether an adapter has all the tensors that its config asks for, and no others: by names and shapes alone.

PEFT passes over tensors that its config has no place for, and leaves those that are missing untrained. So PEFT's own
layers are put on a skeleton of the base, which has its modules and no weights, and their names are compared with those
in the file.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn

from loratune.errors import Exit, LoratuneError, reason_of
from loratune.model.adapter.files import WEIGHTS_FILE
from loratune.model.adapter.tensors import PART, PREFIX, WRAPPER
from loratune.model.architecture.vocabulary import vocabulary_of

Shapes = Mapping[str, Sequence[int]]


def require_complete(folder: Path, config: LoraConfig, given: Shapes, base: Shapes) -> None:
    """Compare the tensors of an adapter's LoRA layers with those that PEFT would make.

    Args:
        folder: of the adapter, for messages.
        config: of its LoRA layers, with names of modules as its targets.
        given: name of each of its tensors → its shape; those of no LoRA layer are not looked at.
        base: name of each parameter of the base → its shape.

    Raises:
        LoratuneError: tensors are missing or left over, or the base has none of the targets.
    """
    found = {name for name in given if PART.fullmatch(name.removeprefix(PREFIX))}
    expected = set(_expected(folder, config, base))
    embedding, head = (f"{PREFIX}{module}." for module in vocabulary_of(base).modules)
    if config.ensure_weight_tying and any(name.startswith(embedding) for name in expected):
        # PEFT gives the head of a tied model what it has learnt for the embedding; the skeleton ties nothing.
        found, expected = ({name for name in names if not name.startswith(head)} for names in (found, expected))
    strange = sorted(found ^ expected)
    if strange:
        raise LoratuneError(
            f"{folder}: its config and its tensors do not belong together: {len(found - expected)} "
            f"tensors too many, {len(expected - found)} too few, first {strange[0]}",
            Exit.MODEL,
        )


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Name of each tensor in an adapter's file → its shape; no values are read.

    Raises:
        LoratuneError: the file is missing or damaged.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():  # a pipe would be waited for
        raise LoratuneError(f"{folder}: no {WEIGHTS_FILE} in it", Exit.MODEL)
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise LoratuneError(f"{path}: cannot be read: {error}", Exit.MODEL) from error


def own_modules(given: Shapes) -> dict[str, tuple[int, ...]]:
    """The matrices of a base that an adapter's tensors are for: name → shape, as far as they tell."""
    modules: dict[str, tuple[int, ...]] = {}
    for name, shape in given.items():
        match = PART.fullmatch(name.removeprefix(PREFIX))
        if match and len(shape) == 2:
            place = f"{WRAPPER.sub('', match['module'] + '.').rstrip('.')}.weight"
            rows, columns = modules.get(place, (1, 1))
            is_up = match["part"] in ("lora_B.weight", "lora_embedding_A")
            modules[place] = (shape[0], columns) if is_up else (rows, shape[1])
    return modules


def _expected(folder: Path, config: LoraConfig, base: Shapes) -> dict[str, Any]:
    skeleton = _skeleton(base)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of tied matrices, which a skeleton has none of
            model = PeftModel(skeleton, config, low_cpu_mem_usage=True)
            return dict(get_peft_model_state_dict(model, save_embedding_layers=False))
    except (ValueError, RuntimeError, KeyError) as error:
        raise LoratuneError(
            f"{folder}: the adapter does not fit the base model: {reason_of(error)}", Exit.MODEL
        ) from error


def _skeleton(base: Shapes) -> nn.Module:
    """The base's matrices as modules without memory, each in its place."""
    root, embedding = nn.Module(), vocabulary_of(base).embedding
    with torch.device("meta"):
        for name, shape in base.items():
            module, _, attribute = name.rpartition(".")
            if attribute != "weight" or len(shape) != 2:
                continue
            place, *parts = root, *module.split(".")
            for part in parts[:-1]:
                if part not in place._modules:
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            rows, columns = shape
            layer = nn.Embedding(rows, columns) if name == embedding else nn.Linear(columns, rows, bias=False)
            place.add_module(parts[-1], layer)
    return root
