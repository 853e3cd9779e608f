"""Checks that an adapter has exactly the tensors of its config, by names and shapes only.

PEFT ignores tensors that its config does not cover, and leaves missing ones untrained. So PEFT's layers are attached to
a skeleton of the base without weights, and their names are compared with those in the file.
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

from loratune.errors import Exit, LoratuneError, counted, reason_of
from loratune.model.adapter.patterns import stacks_of
from loratune.model.adapter.tensors import PART, PREFIX, WRAPPER
from loratune.model.adapter.values import weights_file
from loratune.model.architecture.vocabulary import vocabulary_of

Shapes = Mapping[str, Sequence[int]]


def require_complete(folder: Path, config: LoraConfig, given: Shapes, base: Shapes) -> None:
    """Compare the tensors of an adapter's LoRA layers with those that PEFT would create.

    Args:
        folder: the adapter's folder, for messages.
        config: config of its LoRA layers, with module names as targets.
        given: tensor name → shape; tensors outside LoRA layers are ignored.
        base: parameter name → shape, of the base.

    Raises:
        LoratuneError: tensors are missing or unexpected, or the base has none of the targets.
    """
    found = {name for name in given if PART.fullmatch(name.removeprefix(PREFIX))}
    expected = set(_expected(folder, config, base))
    embedding, head = (f"{PREFIX}{module}." for module in vocabulary_of(base).modules)
    if config.ensure_weight_tying and any(name.startswith(embedding) for name in expected):
        # PEFT copies what it learnt for the embedding to a tied head; the skeleton ties nothing.
        found, expected = ({name for name in names if not name.startswith(head)} for names in (found, expected))
    strange = sorted(found ^ expected)
    if strange:
        raise LoratuneError(
            f"{folder}: its config and its tensors do not match: "
            f"{counted(len(found - expected), 'tensor')} too many, {len(expected - found)} too few, first {strange[0]}",
            Exit.MODEL,
        )


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Return tensor name → shape of an adapter's file, without reading values.

    Raises:
        LoratuneError: the file is missing or damaged.
    """
    path = weights_file(folder)
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise LoratuneError(f"{path}: cannot be read: {error}", Exit.MODEL) from error


def own_modules(given: Shapes) -> dict[str, tuple[int, ...]]:
    """Return the base matrices that an adapter's tensors imply: name → shape, as far as known."""
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
            warnings.simplefilter("ignore", UserWarning)  # about tied matrices, which the skeleton does not have
            model = PeftModel(skeleton, config, low_cpu_mem_usage=True)
            return dict(get_peft_model_state_dict(model, save_embedding_layers=False))
    except (ValueError, RuntimeError, KeyError) as error:
        raise LoratuneError(
            f"{folder}: the adapter does not fit the base model: {reason_of(error)}", Exit.MODEL
        ) from error


def _skeleton(base: Shapes) -> nn.Module:
    """Return the base's matrices as modules on the meta device, under their names."""
    root, embedding, stacks = nn.Module(), vocabulary_of(base).embedding, {*stacks_of(base)}
    with torch.device("meta"):
        for name, shape in base.items():
            module, _, attribute = name.rpartition(".")
            if name in stacks:
                holder = _module_at(root, module.split("."))
                holder.register_parameter(attribute, nn.Parameter(torch.empty(tuple(shape))))
            if attribute != "weight" or len(shape) != 2:
                continue
            *path, last = module.split(".")
            rows, columns = shape
            layer = nn.Embedding(rows, columns) if name == embedding else nn.Linear(columns, rows, bias=False)
            _module_at(root, path).add_module(last, layer)
    return root


def _module_at(root: nn.Module, path: Sequence[str]) -> nn.Module:
    """Return the module of a path, which is made where there is none."""
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    return root
