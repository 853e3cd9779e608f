"""Joins pairs of LoRA matrices: of parts of one matrix, and of all matrices in a stack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch


class Pair(NamedTuple):
    """LoRA of one matrix."""

    down: torch.Tensor
    """A (rank, columns)."""
    up: torch.Tensor
    """B (rows, rank)."""


def joined(parts: Sequence[Pair | None], rows: Sequence[int]) -> Pair:
    """Return one pair for a matrix from pairs for consecutive rows of it: the product is the same.

    Args:
        parts: of each part, in order; None for a part without LoRA.
        rows: number of rows of each part.

    Returns:
        A pair whose rank is the sum of the parts' ranks.
    """
    given = [part for part in parts if part is not None]
    rank = sum(len(part.down) for part in given)
    up = given[0].up.new_zeros(sum(rows), rank)
    row = column = 0
    for part, count in zip(parts, rows, strict=True):
        if part is not None:
            up[row : row + count, column : column + len(part.down)] = part.up
            column += len(part.down)
        row += count
    return Pair(torch.cat([part.down for part in given]), up)


def stacked(pairs: Mapping[int, Pair], count: int) -> Pair:
    """Return PEFT's two matrices for a stack.

    Args:
        pairs: number of a matrix → its pair, all of one rank; other matrices get zeros.
        count: number of matrices in the stack.

    Returns:
        A (count · rank, columns), matrix after matrix, and B (rows, rank · count), rank after rank.
    """
    first = next(iter(pairs.values()))
    down = first.down.new_zeros(count, *first.down.shape)
    up = first.up.new_zeros(count, *first.up.shape)
    for number, pair in pairs.items():
        down[number], up[number] = pair
    return Pair(down.flatten(0, 1), up.permute(1, 2, 0).flatten(1).contiguous())


def exchanged(pair: Pair, count: int) -> Pair:
    """Return PEFT's two matrices for a stack from those of its versions before 0.19, with the sides exchanged.

    Args:
        pair: A (count · rank, rows) and B (columns, rank · count).
        count: number of matrices in the stack.
    """
    down, up = pair
    new_down = up.unflatten(1, (-1, count)).permute(2, 1, 0).flatten(0, 1)
    new_up = down.unflatten(0, (count, -1)).permute(2, 1, 0).flatten(1)
    return Pair(new_down.contiguous(), new_up.contiguous())
