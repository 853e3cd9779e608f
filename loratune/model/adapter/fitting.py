"""Compares the shapes of an adapter's tensors with those of a base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.model.adapter.files import read_config_values
from loratune.model.adapter.patterns import settle_patterns
from loratune.model.adapter.tensors import PART, PREFIX, WRAPPER, AdapterTensors, read_tensors
from loratune.model.architecture.vocabulary import vocabulary_of


def check_fits(folder: Path, base: Mapping[str, Sequence[int]], is_tied: bool) -> None:
    """Raise if an adapter does not match the base's shapes; needs only the headers of the base.

    Args:
        folder, base, is_tied: see `read_tensors`.

    Raises:
        LoratuneError: lists the mismatches.
    """
    problems: list[str] = []
    vocabulary = vocabulary_of(base)
    base = {vocabulary.head: base[vocabulary.embedding], **base} if is_tied else base
    values = settle_patterns(read_config_values(folder), base, folder)
    problems += side_problems(read_tensors(folder, values, base, is_tied, problems), base)
    if problems:
        raise LoratuneError(f"{folder} does not fit the base:\n{bullet_list(problems, limit=5)}", Exit.MODEL)


def side_problems(tensors: AdapterTensors, base: Mapping[str, Sequence[int]], is_whole: bool = True) -> list[str]:
    """Return LoRA matrices that do not have the base's number of rows or columns.

    Args:
        tensors: of the adapter.
        base: parameter name → shape, of the base.
        is_whole: whether a matrix of a parameter that is not given is a problem, too.
    """
    problems, vocabulary = [], vocabulary_of(base)
    for name, tensor in tensors.lora.items():
        match = PART.fullmatch(name.removeprefix(PREFIX))
        side = {"lora_A.weight": 1, "lora_B.weight": 0}.get(match["part"]) if match else None
        if match is None or side is None or tensor.ndim != 2 or match["module"] in tensors.stacks:
            continue
        target = WRAPPER.sub("", f"{match['module']}.") + "weight"
        shape = base.get(target)
        if shape is None and not is_whole:
            continue
        if shape is None or (tensor.shape[side] != shape[side] and target not in vocabulary):
            problems.append(f"{name}: of shape {list(tensor.shape)} for a base of {shape and list(shape)}")
    return problems
