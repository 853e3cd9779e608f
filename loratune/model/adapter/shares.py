"""Translates LoRA of parts of a matrix, or of the matrices in a stack, to LoRA of the whole."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from loratune.errors import Exit, LoratuneError
from loratune.model.adapter.joined_pairs import Pair, joined, stacked
from loratune.model.architecture.other_names import SHARES, Matrix


@dataclass(frozen=True)
class Share:
    """LoRA of a part of a target, as a file has it."""

    matrix: Matrix
    down: torch.Tensor
    """A (rank, columns), or one per matrix of a stack; a stack of one is shared by all."""
    up: torch.Tensor
    """B (rows, rank), or one per matrix of a stack; a stack of one is shared by all."""
    scaling: float
    """Factor of its product."""


@dataclass(frozen=True)
class Whole:
    """LoRA of a target."""

    pair: Pair
    rank: int
    scaling: float


def whole_of(target: str, shares: Sequence[Share], shape: Sequence[int], place: Path) -> Whole:
    """Return the LoRA of a target with the product of its shares.

    Args:
        target: name of the module, or of the parameter with a stack.
        shares: of it; at least one.
        shape: of its matrix (rows, columns), or its stack (number, rows, columns).
        place: the adapter's folder, for messages.

    Raises:
        LoratuneError: the shares do not fit the target or each other.
    """
    if len({share.scaling for share in shares}) > 1:
        raise _unfit(place, target, "its parts have different alpha / rank")
    count = SHARES[target.rpartition(".")[2]]
    try:
        pair = _matrix(shares, shape, count) if len(shape) == 2 else _stack(shares, shape, count)
    except ValueError as error:
        raise _unfit(place, target, str(error)) from error
    rank = len(pair.down) if len(shape) == 2 else len(pair.down) // shape[0]
    return Whole(pair, rank, shares[0].scaling)


def _matrix(shares: Sequence[Share], shape: Sequence[int], count: int) -> Pair:
    """Return LoRA of a matrix.

    Raises:
        ValueError: with the reason.
    """
    found = {share.matrix.place: Pair(share.down, share.up) for share in shares}
    if len(found) < count:
        raise ValueError("not all parts of it have LoRA, so which rows are whose is not known")
    rows = [len(found[number].up) for number in range(count)]
    if sum(rows) != shape[0] or any(pair.down.shape[1] != shape[1] for pair in found.values()):
        raise ValueError(f"its parts are not those of {list(shape)}")
    return joined([found[number] for number in range(count)], rows)


def _stack(shares: Sequence[Share], shape: Sequence[int], count: int) -> Pair:
    """Return LoRA of a stack.

    Raises:
        ValueError: with the reason.
    """
    number, rows, columns = shape
    by_matrix = defaultdict[int, dict[int, Pair]](dict)
    for share in shares:
        for index, pair in _each(share, number).items():
            by_matrix[index][share.matrix.place] = pair
            if (pair.down.shape[1], pair.up.shape[0] * count) != (columns, rows):
                raise ValueError(f"{list(pair.down.shape)} and {list(pair.up.shape)} for {list(shape)}")
    pairs = {
        index: joined([parts.get(place) for place in range(count)], [rows // count] * count)
        for index, parts in by_matrix.items()
    }
    ranks = {len(pair.down) for pair in pairs.values()}
    if len(ranks) > 1 or max(pairs) >= number:
        raise ValueError(f"its matrices have the ranks {sorted(ranks)} and numbers up to {max(pairs)}")
    return stacked(pairs, number)


def _each(share: Share, count: int) -> Mapping[int, Pair]:
    """Return the pair of each matrix of a stack."""
    if share.matrix.number is not None:
        return {share.matrix.number: Pair(share.down, share.up)}
    down, up = (part.expand(count, -1, -1) if len(part) == 1 else part for part in (share.down, share.up))
    return {index: Pair(down[index], up[index]) for index in range(min(len(down), len(up)))}


def _unfit(place: Path, target: str, why: str) -> LoratuneError:
    return LoratuneError(f"{place}: its tensors for {target} cannot be translated to PEFT's layout: {why}", Exit.MODEL)
