"""Computes the merged model's tensors and writes them as safetensors, a bounded number of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from loratune.delivery.merge.update import TensorUpdate
from loratune.errors import Exit, LoratuneError
from loratune.model.architecture.vocabulary import vocabulary_of
from loratune.model.weights.tensor_files import TensorFiles, TensorInfo, plan_shards, write_shards


class TooLargeError(LoratuneError):
    """A value exceeds the range of the merged weights' dtype."""


PIECE_BYTES = 8_000_000
"""Size of the rows that are computed at once, as float32: they stay in a processor's cache between the steps."""


@dataclass(frozen=True)
class MergedTensor:
    """A tensor of the merged model: its source and update."""

    info: TensorInfo
    source: str
    """Name of the base's tensor."""
    update: TensorUpdate | None

    def values(self, base: TensorFiles) -> torch.Tensor:
        """Return the values that the update is applied to: the base's, or the adapter's replacement."""
        found = base.tensor(self.source)
        return self.update.source(found) if self.update else found


@dataclass(frozen=True)
class MergePlan:
    """The content of the merged model's files."""

    tensors: dict[str, MergedTensor]
    shards: dict[str, list[TensorInfo]]
    """File → its tensors."""
    is_tied: bool
    """Whether embedding and head are tied in the merged model."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.info.nbytes for tensor in self.tensors.values())

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return self.tensors[vocabulary_of(self.tensors).embedding].info.shape[0]

    @property
    def dtype_names(self) -> str:
        """The dtypes of its tensors as text."""
        return dtype_names(tensor.info for tensor in self.tensors.values())

    @property
    def updated(self) -> list[MergedTensor]:
        """The tensors that the adapter changes."""
        return [tensor for tensor in self.tensors.values() if tensor.update]


def dtype_names(infos: Iterable[TensorInfo]) -> str:
    """Return the dtypes of tensors as text."""
    return " and ".join(dict.fromkeys(str(info.dtype).removeprefix("torch.") for info in infos))


def plan_merge(
    base: TensorFiles, updates: dict[str, TensorUpdate], is_tied: bool, dtype: torch.dtype | None, shard_bytes: int
) -> MergePlan:
    """Plan the merged model.

    Args:
        base: the base's tensors.
        updates: tensor name → update.
        is_tied: whether embedding and head of the base are tied.
        dtype: dtype of floating-point tensors; None keeps each one's own.
        shard_bytes: maximum bytes of values per file.
    """
    embedding, head = vocabulary_of(base.infos)
    stays_tied = is_tied and _changes_alike(updates.get(embedding), updates.get(head))
    tensors: dict[str, MergedTensor] = {}
    for name, info in base.infos.items():
        if is_tied and name == head:
            continue  # an unused copy; added below if it is needed
        kept = dtype is None or not info.dtype.is_floating_point
        update = updates.get(name)
        shape = info.shape if update is None or update.replacement is None else tuple(update.replacement.shape)
        written = TensorInfo(name, info.dtype if kept or dtype is None else dtype, shape)
        tensors[name] = MergedTensor(written, name, update)
    if is_tied and not stays_tied:
        like = tensors[embedding].info
        tensors[head] = MergedTensor(TensorInfo(head, like.dtype, like.shape), embedding, updates.get(head))
    shards = plan_shards([tensor.info for tensor in tensors.values()], shard_bytes)
    return MergePlan(tensors, shards, stays_tied)


def write_merged(plan: MergePlan, base: TensorFiles, folder: Path, advance: Callable[[int], None]) -> None:
    """Write the merged model's safetensors.

    Args:
        plan: result of `plan_merge`.
        base: the base's tensors.
        folder: an existing folder.
        advance: called with the bytes of each finished piece.
    """

    def pieces(info: TensorInfo) -> Iterator[torch.Tensor]:
        for _, piece in merged_pieces(plan.tensors[info.name], base):
            yield piece
            advance(piece.nbytes)

    threads = torch.get_num_threads()
    # Leaves a core to the writing thread, since torch's threads would occupy it with busy waiting.
    torch.set_num_threads(max(1, threads - 1))
    try:
        write_shards(folder, plan.shards, pieces)
    finally:
        torch.set_num_threads(threads)


def merged_pieces(tensor: MergedTensor, base: TensorFiles) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (first row, rows) of a merged tensor in its dtype: added in float32 and rounded once.

    Raises:
        TooLargeError: a value exceeds float16.
    """
    source = tensor.values(base)
    row_bytes = 4 * max(1, math.prod(source.shape[1:]))
    step = max(1, PIECE_BYTES // row_bytes)
    whole = source if source.ndim else source.reshape(1)
    for start in range(0, len(whole), step):
        rows = whole[start : start + step]
        if tensor.update:
            rows = tensor.update.apply(rows.float(), start)
        written = rows.to(tensor.info.dtype)
        if written.dtype == torch.float16 != rows.dtype and (written.isinf() & rows.isfinite()).any():
            raise TooLargeError(f"{tensor.info.name}: holds values that float16 cannot", Exit.MODEL)
        yield start, written
        base.release([tensor.source])


def _changes_alike(embedding: TensorUpdate | None, head: TensorUpdate | None) -> bool:
    """Return whether embedding and head get the same update, or none."""
    if embedding is None or head is None:
        return embedding is head
    return embedding.equals(head)
