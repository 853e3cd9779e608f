"""Maps a model's parameters in memory to the tensors in its files.

transformers renames tensors on loading, and fuses some, such as those of a mixture's experts. Its conversions are
applied to the names in the files, so that loratune can write files with the same names.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from loratune.errors import Exit, LoratuneError, counted
from loratune.model.config import empty_model, load_config
from loratune.model.files import weight_files
from loratune.model.weights.tensor_files import TensorFiles, TensorInfo
from loratune.protocols import CausalModel


class Divisible(Protocol):
    """A change of a parameter, which may consist of several tensors in the files."""

    def part(self, expert: int | None, rows: slice) -> Any:
        """Return the change of some rows.

        Args:
            expert: index of their matrix in a stack; None if the parameter is no stack.
            rows: with a start and a stop.
        """


Change = TypeVar("Change", bound=Divisible)


@dataclass(frozen=True)
class Part:
    """A tensor of the files as a part of a parameter."""

    tensor: str
    expert: int | None = None
    """Index along the parameter's first dimension; None if the tensor has all dimensions itself."""
    place: int = 0
    """Position among the tensors that are concatenated along the next dimension."""


@dataclass(frozen=True)
class Place:
    """Where a tensor of the files is in a parameter."""

    tensor: str
    expert: int | None = None
    """Index along the parameter's first dimension; None if the tensor has all dimensions itself."""
    rows: slice | None = None
    """Rows of the parameter, or of that matrix; None if the tensor equals the parameter."""


@dataclass(frozen=True)
class FileLayout:
    """The mapping between parameters and tensors of the files."""

    parts: dict[str, tuple[Part, ...]]
    """Parameter name → its tensors, in order."""
    unused: tuple[str, ...]
    """Tensors of the files that belong to no parameter."""

    def shapes(self, held: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter, and of unused tensors.

        Args:
            held: shapes of the files' tensors.
        """
        found = {name: _shape(parts, held) for name, parts in self.parts.items()}
        return found | {name: held[name] for name in self.unused}

    def infos(self, held: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Return dtype and shape of each parameter."""
        shapes = self.shapes({name: info.shape for name, info in held.items()})
        return {name: TensorInfo(name, held[parts[0].tensor].dtype, shapes[name]) for name, parts in self.parts.items()}

    def read(self, parameter: str, files: TensorFiles) -> torch.Tensor:
        """Return a parameter's values: memory-mapped if it is a single tensor, otherwise assembled in memory."""
        parts = self.parts[parameter]
        if _is_whole(parts):
            return files.tensor(parts[0].tensor)
        experts = list(dict.fromkeys(part.expert for part in parts))
        if None in experts:
            return self.matrix(parameter, 0, files)
        return torch.stack([self.matrix(parameter, int(expert or 0), files) for expert in experts])

    def rows(self, parameter: str, rows: slice, files: TensorFiles) -> torch.Tensor:
        """Return a part of a parameter along its first dimension: of a stack, whole matrices.

        Args:
            parameter: its name.
            rows: with a start and a stop.
            files: that hold its tensors.
        """
        parts = self.parts[parameter]
        if _is_whole(parts):
            return files.tensor(parts[0].tensor)[rows]
        if any(part.expert is None for part in parts):
            return self.matrix(parameter, 0, files)[rows]
        return torch.stack([self.matrix(parameter, number, files) for number in range(rows.start, rows.stop)])

    def matrix(self, parameter: str, expert: int, files: TensorFiles) -> torch.Tensor:
        """Return one matrix of a stack, in the files' dtype; of a single tensor, a view of the file."""
        parts = self.parts[parameter]
        if _is_whole(parts):
            return files.tensor(parts[0].tensor)[expert]
        tensors = [files.tensor(part.tensor) for part in parts if part.expert in (expert, None)]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def first_part(self, parameter: str, expert: int, files: TensorFiles) -> torch.Tensor:
        """Return a view of the first rows of a stack's matrix: what a single tensor of the files has of it."""
        parts = self.parts[parameter]
        first = next(part for part in parts if part.expert in (expert, None))
        values = files.tensor(first.tensor)
        return values[expert] if first.expert is None else values

    def tensors_of(self, parameter: str) -> list[str]:
        """Return the names of a parameter's tensors."""
        return [part.tensor for part in self.parts[parameter]]

    def tensor_of(self, parameter: str) -> str:
        """Return the name of the tensor that equals a parameter.

        Raises:
            LoratuneError: the parameter consists of several tensors.
        """
        parts = self.parts.get(parameter)
        if parts is None:  # an untied head, which the base's files lack
            return parameter
        if not _is_whole(parts):
            raise LoratuneError(
                f"{parameter} is made of {counted(len(parts), 'tensor of the files')}, first {parts[0].tensor}; none "
                "equals it",
                Exit.MODEL,
            )
        return parts[0].tensor

    def in_files(self, changes: Mapping[str, Change], held: Mapping[str, TensorInfo]) -> dict[str, Change]:
        """Convert changes of parameters to changes of the files' tensors.

        Args:
            changes: parameter → its change.
            held: the files' tensors.
        """
        return {
            place.tensor: change if place.rows is None else change.part(place.expert, place.rows)
            for name, change in changes.items()
            for place in self.places(name, held)
        }

    def places(self, parameter: str, held: Mapping[str, TensorInfo]) -> list[Place]:
        """Return which part of a parameter each of its tensors is, in order.

        Args:
            parameter: its name. Of an untied head, which the base's files lack, the name is the tensor's too.
            held: the files' tensors.
        """
        parts = self.parts.get(parameter, (Part(parameter),))
        if _is_whole(parts):
            return [Place(parts[0].tensor)]
        ends: dict[int | None, int] = defaultdict(int)
        found = []
        for part in parts:
            start = ends[part.expert]
            ends[part.expert] += held[part.tensor].shape[0]
            found.append(Place(part.tensor, part.expert, slice(start, ends[part.expert])))
        return found


def file_layout(model: CausalModel, held: Iterable[str]) -> FileLayout:
    """What transformers makes of a model's files.

    Args:
        model: the model in memory, with or without values.
        held: names of the files' tensors.

    Raises:
        LoratuneError: a parameter is computed from tensors by other operations than stacking and concatenating.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [step for step in mapping if isinstance(step, WeightRenaming)]
    converters = [step for step in mapping if isinstance(step, WeightConverter)]
    by_pattern = {pattern: step for step in converters for pattern in step.source_patterns}
    parameters, found, unused = model.state_dict(), defaultdict[str, list[tuple[str, str | None]]](list), []
    for name in held:
        renamed = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if renamed[0] not in parameters and name in parameters:
            renamed = (name, None)
        if renamed[0] in parameters:
            found[renamed[0]].append((name, renamed[1]))
        else:
            unused.append(name)
    parts = {}
    for parameter in (name for name in parameters if name in found):  # in the model's order, as PEFT wraps them
        tensors = found[parameter]
        in_order = sorted(tensors, key=lambda tensor: dot_natural_key(tensor[0]))  # sorts experts numerically
        pattern = tensors[0][1]
        parts[parameter] = _parts(parameter, in_order, None if pattern is None else by_pattern[pattern])
    return FileLayout(parts, tuple(unused))


def parameter_infos(folder: Path) -> dict[str, TensorInfo]:
    """Return dtype and shape of each parameter of a model folder.

    Unused tensors are left out: an adapter's short names would match them too, as those of multi-token prediction.

    Raises:
        LoratuneError: see `file_layout` and `load_config`.
    """
    held = TensorFiles(weight_files(folder)).infos
    return file_layout(empty_model(load_config(folder)), held).infos(held)


def prediction_tensors(unused: Iterable[str], layers: int) -> list[str]:
    """Return the tensors that predict further tokens, for speculative decoding; transformers does not load them.

    Args:
        unused: tensors of the files that belong to no parameter.
        layers: number of the model's own layers, behind which some families have those for prediction.
    """
    return [
        name
        for name in unused
        if re.search(r"(^|\.)mtp\.", name)
        or ((match := re.search(r"\.layers\.(\d+)\.", name)) and int(match[1]) >= layers)
    ]


def _parts(parameter: str, tensors: list[tuple[str, str | None]], step: Any) -> tuple[Part, ...]:
    if step is None:
        if len(tensors) > 1:
            raise LoratuneError(
                f"{parameter} is in the files twice, as {tensors[0][0]} and {tensors[1][0]}", Exit.MODEL
            )
        return (Part(tensors[0][0]),)
    kinds = [(type(operation), operation.dim) for operation in step.operations if hasattr(operation, "dim")]
    stacked, joined = [(MergeModulelist, 0)], [(Concatenate, 0)]
    if len(kinds) != len(step.operations) or kinds not in (stacked, joined, [*stacked, (Concatenate, 1)]):
        operations = " and ".join(type(operation).__name__ for operation in step.operations)
        raise LoratuneError(
            f"{parameter}: transformers computes it from {tensors[0][0]} by {operations}, which loratune cannot invert",
            Exit.MODEL,
        )
    places: dict[str | None, int] = defaultdict(int)
    parts = []
    for name, pattern in tensors:
        expert = places[pattern] if kinds[0] == stacked[0] else None
        places[pattern] += 1
        parts.append(Part(name, expert, step.source_patterns.index(pattern)))
    return tuple(sorted(parts, key=lambda part: (part.expert or 0, part.place)))


def _is_whole(parts: tuple[Part, ...]) -> bool:
    return len(parts) == 1 and parts[0].expert is None


def _shape(parts: tuple[Part, ...], held: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    first = held[parts[0].tensor]
    if _is_whole(parts):
        return first
    shape = (sum(held[part.tensor][0] for part in parts if part.expert == parts[0].expert), *first[1:])
    experts = {part.expert for part in parts}
    return shape if None in experts else (len(experts), *shape)
