"""Reads an adapter as updates of the base's tensors; if a tensor cannot be assigned, nothing is merged.

A linear layer becomes W + s·B·A with s = alpha/r (LoRA, https://arxiv.org/abs/2106.09685) or alpha/√r (rsLoRA,
https://arxiv.org/abs/2312.03732); DoRA (https://arxiv.org/abs/2402.09353) gives each of its rows a trained norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.model.adapter.files import read_config_values
from loratune.model.adapter.other_layouts import in_peft_layout
from loratune.model.adapter.patterns import settle_patterns
from loratune.model.adapter.stacks import DOWN, UP, stack_factors
from loratune.model.adapter.tensors import (
    PART,
    PREFIX,
    RANK_AXES,
    WRAPPER,
    AdapterTensors,
    rank_and_alpha,
    read_tensors,
)
from loratune.model.adapter.values import scaling
from loratune.model.architecture.vocabulary import vocabulary_of
from loratune.model.weights.tensor_files import TensorInfo


@dataclass
class TensorUpdate:
    """The adapter's update of one parameter of the base, or of the equal tensor in its files."""

    replacement: torch.Tensor | None = None
    """Replaces the base's values: modules_to_save, trained biases; the number of vocabulary rows may differ."""
    up: torch.Tensor | None = None
    """B (rows, rank), or (matrices, rows, rank) for a stack of matrices."""
    down: torch.Tensor | None = None
    """A (rank, columns), or (matrices, rank, columns)."""
    scaling: float = 1.0
    magnitude: torch.Tensor | None = None
    """DoRA's norm of each row (rows,)."""
    shift: torch.Tensor | None = None
    """Added to a bias (rows,), without scaling."""
    row_numbers: torch.Tensor | None = None
    """Numbers of replaced rows, such as those of trained tokens."""
    row_values: torch.Tensor | None = None
    """Values of the replaced rows (replaced rows, columns)."""

    def part(self, expert: int | None, rows: slice) -> TensorUpdate:
        """Return the update of some rows of a parameter, or of a matrix in a stack; see `Divisible`."""
        whole, found = self if expert is None else self._matrix(expert), TensorUpdate()
        for name, value in vars(whole).items():
            divided = name in ("replacement", "up", "magnitude", "shift") and value is not None
            setattr(found, name, value[rows] if divided else value)
        if whole.row_numbers is not None and whole.row_values is not None:
            here = (whole.row_numbers >= rows.start) & (whole.row_numbers < rows.stop)
            found.row_numbers, found.row_values = whole.row_numbers[here] - rows.start, whole.row_values[here]
        return found

    def _matrix(self, number: int) -> TensorUpdate:
        """Return the update of one matrix of a stack, which has a product or a replacement only."""
        return TensorUpdate(
            replacement=None if self.replacement is None else self.replacement[number],
            up=None if self.up is None else self.up[number],
            down=None if self.down is None else self.down[number],
            scaling=self.scaling,
        )

    def transposed(self) -> TensorUpdate:
        """Return the update of the transposed matrix."""
        up, down = self.up, self.down
        return replace(self, up=None if down is None else down.T, down=None if up is None else up.T)

    def source(self, base: torch.Tensor) -> torch.Tensor:
        """Return the values that the other parts change."""
        return base if self.replacement is None else self.replacement

    def apply(self, base: torch.Tensor, start: int) -> torch.Tensor:
        """Return the updated rows from `start` on.

        Args:
            base: (n, columns) or (n,) rows of the source, or n matrices of a stack, in the dtype of the computation,
                float32 or float64; not modified.
            start: number of the first row.

        Returns:
            The same shape and dtype; the source itself if nothing changes it.
        """
        rows, dtype = slice(start, start + len(base)), base.dtype
        updated = base
        if self.row_numbers is not None and self.row_values is not None:
            here = (self.row_numbers >= start) & (self.row_numbers < start + len(base))
            updated = base.index_copy(0, self.row_numbers[here] - start, self.row_values[here].to(dtype))
        if self.up is not None and self.down is not None:
            # The product is computed first: accumulating onto the base's values would lose bits at each addition.
            down = self.down if self.down.ndim == 2 else self.down[rows]
            updated = updated.add(self.up[rows].to(dtype) @ down.to(dtype), alpha=self.scaling)
        if self.magnitude is not None:
            lengths = torch.linalg.vector_norm(updated, dim=1, dtype=torch.float64)  # float64 for a long sum of squares
            updated = updated * (self.magnitude[rows].double() / lengths).to(dtype).unsqueeze(1)
        if self.shift is not None:
            updated = updated + self.scaling * self.shift[rows].to(dtype)
        return updated

    def shapes(self) -> Iterator[tuple[int, ...]]:
        """Yield the shape of the source that each part implies; 0 stands for any length."""
        if self.shift is not None:
            yield tuple(self.shift.shape)
        if self.up is not None and self.down is not None:
            yield *self.up.shape[:-1], self.down.shape[-1]
        if self.magnitude is not None:
            yield self.magnitude.shape[0], 0

    @property
    def is_nothing(self) -> bool:
        """Whether it leaves every value unchanged, like LoRA before its first step."""
        if any(part is not None for part in (self.replacement, self.magnitude, self.row_values)):
            return False
        has_product = self.up is not None and self.down is not None and bool(self.up.any()) and bool(self.down.any())
        return self.scaling == 0 or not (has_product or (self.shift is not None and bool(self.shift.any())))

    def equals(self, other: TensorUpdate) -> bool:
        """Return whether both updates have the same effect."""
        mine, theirs = (
            [value for value in vars(update).values() if not isinstance(value, float)] for update in (self, other)
        )
        return self.scaling == other.scaling and all(
            a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(mine, theirs, strict=True)
        )


def read_updates(
    adapter: Path, base: dict[str, TensorInfo], is_tied: bool, transposed: Set[str] = frozenset()
) -> dict[str, TensorUpdate]:
    """Read an adapter as updates of the base's parameters.

    Args:
        adapter: PEFT folder.
        base: the base's parameters.
        is_tied: whether embedding and head of the base are tied.
        transposed: parameters of the base that have the shape (inputs, outputs).

    Returns:
        Parameter name → update. A trained tied head has its own entry.

    Raises:
        LoratuneError: a tensor does not match the base, or the config has a setting that cannot be merged.
    """
    problems: list[str] = []
    shapes = {name: info.shape for name, info in base.items()}
    if is_tied:
        embedding, head = vocabulary_of(shapes)
        shapes[head] = shapes[embedding]
    files = in_peft_layout(adapter, shapes)
    config = settle_patterns(read_config_values(files), shapes, adapter)
    tensors = read_tensors(files, config, shapes, is_tied, problems)
    updates = {target: TensorUpdate(replacement=whole) for target, whole in tensors.whole.items()}
    for target, (numbers, values) in tensors.rows.items():
        update = updates.setdefault(target, TensorUpdate())
        update.row_numbers, update.row_values = torch.tensor(numbers), values
    for name, tensor in tensors.lora.items():
        if tensors.parameter_of(name) is None:
            _take(updates, name.removeprefix(PREFIX), tensor, config, vocabulary_of(shapes).embedding, problems)
    problems += _transpose(updates, transposed)
    updates |= _stack_updates(tensors, config, shapes, transposed)
    shapes |= {target: tuple(whole.shape) for target, whole in tensors.whole.items()}
    for target, update in updates.items():
        if target in shapes:
            problems += _shape_problems(target, update, shapes[target])
        elif target not in tensors.rows:  # already reported
            problems.append(f"{target}: the base has no such parameter")
    if problems:
        raise LoratuneError(
            f"{adapter}: the adapter does not fit the base, so nothing is merged:\n{bullet_list(problems, limit=5)}",
            Exit.MODEL,
        )
    return updates


def _transpose(updates: dict[str, TensorUpdate], transposed: Set[str]) -> list[str]:
    """Give updates the orientation of their parameters; return problems."""
    problems = []
    for name in sorted(transposed & updates.keys()):
        updates[name] = updates[name].transposed()
        if updates[name].magnitude is not None:
            problems.append(f"{name}: DoRA on a transposed matrix cannot be merged")
            updates[name].magnitude = None  # whose shape would be told again
    return problems


def _stack_updates(
    tensors: AdapterTensors, config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], transposed: Set[str]
) -> dict[str, TensorUpdate]:
    """Return the updates of parameters with the matrices of several experts."""
    updates = {}
    for place, name in tensors.stacks.items():
        down, up = (tensors.lora[f"{PREFIX}{place}.{part}"] for part in (DOWN, UP))
        rows, columns = stack_factors(down, up, shapes[name], name in transposed)
        given = rank_and_alpha(config, name)
        updates[name] = TensorUpdate(up=rows, down=columns, scaling=scaling(given.alpha, given.rank, config))
    return updates


def _take(
    updates: dict[str, TensorUpdate],
    name: str,
    tensor: torch.Tensor,
    config: dict[str, Any],
    embedding: str,
    problems: list[str],
) -> None:
    """Assign one tensor of a LoRA layer to an update."""
    match = PART.fullmatch(name)
    if match is None:
        raise RuntimeError(f"{name} is not of a LoRA layer")
    module, part = WRAPPER.sub("", match["module"] + ".").rstrip("."), match["part"]
    if part == "lora_magnitude_vector" and f"{module}.weight" == embedding:
        problems.append(f"{name}: DoRA on an embedding cannot be merged")
        return
    target = f"{module}.bias" if part == "lora_B.bias" else f"{module}.weight"
    update = updates.setdefault(target, TensorUpdate())
    given = rank_and_alpha(config, module)
    if part in RANK_AXES and tensor.ndim != 2:
        return  # which has been told
    update.scaling = scaling(given.alpha, given.rank, config)
    if part in ("lora_A.weight", "lora_embedding_B"):
        update.down = tensor.T if "embedding" in part else tensor
    elif part in ("lora_B.weight", "lora_embedding_A"):
        update.up = tensor.T if "embedding" in part else tensor
    elif part == "lora_B.bias":
        update.shift = tensor
    else:
        update.magnitude = tensor.reshape(-1)


def _shape_problems(name: str, update: TensorUpdate, source: tuple[int, ...]) -> list[str]:
    problems = []
    if (update.up is None) != (update.down is None):
        problems.append(f"{name}: only one of the two matrices is there")
    for shape in update.shapes():
        fits = [implied in (0, length) for implied, length in zip(shape, source, strict=False)]
        if len(shape) != len(source) or not all(fits):
            problems.append(f"{name}: an update of shape {list(shape)} for a base of {list(source)}")
    return problems
