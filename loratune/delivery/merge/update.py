"""An adapter as changes to the base's tensors: every tensor of the adapter belongs to one, or nothing is merged.

A linear layer becomes W + s·B·A with s = alpha/r (LoRA, https://arxiv.org/abs/2106.09685) or alpha/√r (rsLoRA,
https://arxiv.org/abs/2312.03732); DoRA (https://arxiv.org/abs/2402.09353) gives each row of it a trained length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.model.adapter.files import read_config_values
from loratune.model.adapter.patterns import settle_patterns
from loratune.model.adapter.tensors import (
    PART,
    PREFIX,
    RANK_AXES,
    WRAPPER,
    rank_and_alpha,
    read_tensors,
)
from loratune.model.adapter.values import scaling
from loratune.model.architecture.vocabulary import vocabulary_of
from loratune.model.weights.tensor_files import TensorInfo


@dataclass
class TensorUpdate:
    """What an adapter does to one parameter of the base, or to the tensor of its files that the parameter is."""

    replacement: torch.Tensor | None = None
    """Takes the place of the base's values: modules_to_save, trained biases. A vocabulary may have other rows then."""
    up: torch.Tensor | None = None
    """B (rows, rank)."""
    down: torch.Tensor | None = None
    """A (rank, columns)."""
    scaling: float = 1.0
    magnitude: torch.Tensor | None = None
    """DoRA's length of each row (rows,)."""
    shift: torch.Tensor | None = None
    """Added to a bias (rows,), unscaled."""
    row_numbers: torch.Tensor | None = None
    """Of rows that are replaced, as those of trained tokens are."""
    row_values: torch.Tensor | None = None
    """What takes their place (replaced rows, columns)."""

    def source(self, base: torch.Tensor) -> torch.Tensor:
        """The values that the other parts change."""
        return base if self.replacement is None else self.replacement

    def apply(self, base: torch.Tensor, start: int) -> torch.Tensor:
        """The updated rows from `start` on.

        Args:
            base: (n, columns) or (n,) rows of the source in the type to compute in, float32 or float64; not changed.
            start: number of the first row.

        Returns:
            The same shape and type; the source itself where nothing changes it.
        """
        rows, dtype = slice(start, start + len(base)), base.dtype
        updated = base
        if self.row_numbers is not None and self.row_values is not None:
            here = (self.row_numbers >= start) & (self.row_numbers < start + len(base))
            updated = base.index_copy(0, self.row_numbers[here] - start, self.row_values[here].to(dtype))
        if self.up is not None and self.down is not None:
            # The product by itself: sums that start from the base's values would round the update away bit by bit.
            updated = updated.add(self.up[rows].to(dtype) @ self.down.to(dtype), alpha=self.scaling)
        if self.magnitude is not None:
            lengths = torch.linalg.vector_norm(updated, dim=1, dtype=torch.float64)  # a long sum of squares
            updated = updated * (self.magnitude[rows].double() / lengths).to(dtype).unsqueeze(1)
        if self.shift is not None:
            updated = updated + self.scaling * self.shift[rows].to(dtype)
        return updated

    def shapes(self) -> Iterator[tuple[int, ...]]:
        """The shape of the source as each part implies it; 0 stands for any length."""
        if self.shift is not None:
            yield tuple(self.shift.shape)
        if self.up is not None and self.down is not None:
            yield self.up.shape[0], self.down.shape[1]
        if self.magnitude is not None:
            yield self.magnitude.shape[0], 0

    @property
    def is_nothing(self) -> bool:
        """Whether it leaves every value as it is, as LoRA does before its first step."""
        if any(part is not None for part in (self.replacement, self.magnitude, self.row_values)):
            return False
        has_product = self.up is not None and self.down is not None and bool(self.up.any()) and bool(self.down.any())
        return self.scaling == 0 or not (has_product or (self.shift is not None and bool(self.shift.any())))

    def equals(self, other: TensorUpdate) -> bool:
        """Whether both make the same of the same values."""
        mine, theirs = (
            [value for value in vars(update).values() if not isinstance(value, float)] for update in (self, other)
        )
        return self.scaling == other.scaling and all(
            a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(mine, theirs, strict=True)
        )


def read_updates(adapter: Path, base: dict[str, TensorInfo], is_tied: bool) -> dict[str, TensorUpdate]:
    """Read an adapter as updates of the base's tensors.

    Args:
        adapter: PEFT folder.
        base: the base's parameters.
        is_tied: whether the base has one matrix for embedding and head.

    Returns:
        Name of a parameter → its update. A tied head that is trained has an entry of its own.

    Raises:
        LoratuneError: a tensor of the adapter has no place in the base or another shape, or its config says something
            that a merged matrix cannot hold.
    """
    problems: list[str] = []
    shapes = {name: info.shape for name, info in base.items()}
    if is_tied:
        embedding, head = vocabulary_of(shapes)
        shapes[head] = shapes[embedding]
    config = settle_patterns(read_config_values(adapter), shapes, adapter)
    tensors = read_tensors(adapter, config, shapes, is_tied, problems)
    updates = {target: TensorUpdate(replacement=whole) for target, whole in tensors.whole.items()}
    for target, (numbers, values) in tensors.rows.items():
        update = updates.setdefault(target, TensorUpdate())
        update.row_numbers, update.row_values = torch.tensor(numbers), values
    for name, tensor in tensors.lora.items():
        _take(updates, name.removeprefix(PREFIX), tensor, config, vocabulary_of(shapes).embedding, problems)
    shapes |= {target: tuple(whole.shape) for target, whole in tensors.whole.items()}
    for target, update in updates.items():
        if target in shapes:
            problems += _shape_problems(target, update, shapes[target])
        elif target not in tensors.rows:  # which has been told already
            problems.append(f"{target}: the base has no such parameter")
    if problems:
        raise LoratuneError(
            f"{adapter}: {len(problems)} tensors of the adapter do not fit the base, so nothing is merged:\n"
            f"{bullet_list(problems, limit=5)}",
            Exit.MODEL,
        )
    return updates


def _take(
    updates: dict[str, TensorUpdate],
    name: str,
    tensor: torch.Tensor,
    config: dict[str, Any],
    embedding: str,
    problems: list[str],
) -> None:
    """Put one tensor of a LoRA layer where it belongs."""
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
