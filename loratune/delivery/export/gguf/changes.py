"""Converts a parameter's values to those of its tensors in a GGUF file.

llama.cpp's graphs expect some values in another order than transformers' code, or already computed: the factor that a
norm applies rather than its weight, the decay of a state rather than its logarithm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from loratune.model.architecture.structure import DeltaNet

Rows: TypeAlias = torch.Tensor
"""Indices of the rows to take, in order."""


Formula = Callable[[torch.Tensor], torch.Tensor]
"""A function of each value, which is computed in float32."""


def plus_one(values: torch.Tensor) -> torch.Tensor:
    """The factor of a norm that adds 1 to its weight."""
    return values.float() + 1


def decay(values: torch.Tensor) -> torch.Tensor:
    """The rate at which a state decays, of its logarithm."""
    return -values.float().exp()


@dataclass(frozen=True)
class Change:
    """What makes a file's tensor of a parameter; without arguments, nothing is changed but dimensions of size 1."""

    rows: Rows | None = None
    """Which of the parameter's slices, and in what order; None for all of them."""
    dim: int = 0
    """Dimension of these slices; negative if the parameter may be given matrix by matrix."""
    formula: Formula | None = None

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        """Return the tensor of a parameter's values; its dimensions of size 1 are kept."""
        if self.rows is not None:
            values = values.index_select(self.dim, self.rows)
        return self.formula(values) if self.formula else values


UNCHANGED = Change()


def paired_rows(size: int, heads: int) -> Rows:
    """Rows so that the two that are rotated together are adjacent.

    Args:
        size: number of rows, heads × head size; in each head, all first elements of the pairs precede all second ones.
        heads: number of heads.
    """
    rows: Rows = torch.arange(size).unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten()
    return rows


def part_rows(size: int, part: int, parts: int) -> Rows:
    """Rows of one of several matrices of equal size that are joined in one."""
    rows: Rows = torch.arange(size).chunk(parts)[part]
    return rows


def tiled_heads(net: DeltaNet, values_per_head: int, before: int = 0) -> Rows:
    """Rows of value heads: the first head of each key head, then the second of each.

    transformers has the value heads of one key head beside each other. ggml repeats the keys as a whole instead.

    Args:
        net: sizes of the layer.
        values_per_head: rows of each value head.
        before: rows before the first value head, which keep their places.
    """
    grouped = torch.arange(net.value_heads * values_per_head).view(net.key_heads, -1, values_per_head)
    return torch.cat([torch.arange(before), before + grouped.transpose(0, 1).flatten()])


def joined_projection_rows(net: DeltaNet) -> tuple[Rows, Rows]:
    """Rows of a projection that has query, key, value and gate of each key head beside each other.

    Returns:
        Rows of all queries, then all keys, then all values; and rows of all gates.
    """
    values = net.value_heads // net.key_heads * net.value_size
    sizes = [net.key_size, net.key_size, values, values]
    *mixed, gates = torch.arange(net.key_heads * sum(sizes)).view(net.key_heads, -1).split(sizes, dim=1)
    return torch.cat([rows.flatten() for rows in mixed]), gates.flatten()
