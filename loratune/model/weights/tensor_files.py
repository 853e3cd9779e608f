"""Reads safetensors in place and writes them as a stream, so that a model never has to fit into memory.

The format is a length, a JSON header and the tensors' bytes (https://github.com/huggingface/safetensors#format). The
library reads and writes whole tensors. Here a tensor is a view of the memory-mapped file whose pages can be released,
and tensors are written in pieces.
"""

from __future__ import annotations

import json
import math
import mmap
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from loratune.errors import Exit, LoratuneError
from loratune.safetensors_header import read_header

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """Name, dtype and shape of a tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * int(self.dtype.itemsize)


NO_RESERVE = 0x4000
"""Linux's MAP_NORESERVE, which Python 3.11 has no name for."""


def _mapped(file: BinaryIO) -> mmap.mmap:
    """Map a file so that writes stay in this process."""
    if sys.platform != "linux":
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    # Without memory set aside for copies of all pages: Linux refuses to map a file larger than its memory otherwise.
    return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


class TensorFiles:
    """The tensors of safetensors files, as memory-mapped views.

    Args:
        paths: the files.

    Raises:
        LoratuneError: a header is damaged, or a tensor has an unsupported dtype.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.infos: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[mmap.mmap, int]] = {}
        for path in paths:
            begin, header = read_header(path)
            with path.open("rb") as file:
                mapping = _mapped(file)
            for name, entry in header.items():
                if entry["dtype"] not in DTYPES:
                    raise LoratuneError(f"{path}: {name} has the unsupported dtype {entry['dtype']}", Exit.MODEL)
                self.infos[name] = TensorInfo(name, DTYPES[entry["dtype"]], tuple(entry["shape"]))
                self._places[name] = (mapping, begin + entry["data_offsets"][0])

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorFiles:
        """Return this object: PEFT copies modules that are bound to files, and mapped files cannot be copied."""
        return self

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor as a view of the file; writes to it stay in this process."""
        info = self.infos[name]
        mapping, start = self._places[name]
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        flat = torch.frombuffer(mapping, dtype=torch.uint8, count=info.nbytes, offset=start)
        if start % info.dtype.itemsize:  # older files, before the format required alignment
            flat = flat.clone()
        return flat.view(info.dtype).view(info.shape)

    def release(self, names: Iterable[str]) -> None:
        """Release the pages of some tensors; they are mapped again on next use."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        for name in names:
            if self.infos[name].nbytes == 0:
                continue
            mapping, start = self._places[name]
            page_start = start - start % mmap.PAGESIZE
            length = min(start + self.infos[name].nbytes, len(mapping)) - page_start
            mapping.madvise(mmap.MADV_DONTNEED, page_start, length)


def plan_shards(tensors: Sequence[TensorInfo], shard_bytes: int) -> dict[str, list[TensorInfo]]:
    """Distribute tensors over files of at most `shard_bytes`, in order; a larger tensor gets its own file."""
    shards: list[list[TensorInfo]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{place:05}-of-{len(shards):05}.safetensors": shard for place, shard in enumerate(shards, 1)}


def write_shards(
    folder: Path,
    shards: dict[str, list[TensorInfo]],
    pieces: Callable[[TensorInfo], Iterator[torch.Tensor]],
) -> None:
    """Write the files of a model and, if there are several, their index.

    Args:
        folder: an existing folder.
        shards: file name → its tensors, from `plan_shards`.
        pieces: yields a tensor's values in contiguous pieces, in order, in its dtype.

    Raises:
        RuntimeError: the pieces do not add up to the tensor's size.
    """
    for name, tensors in shards.items():
        with (folder / name).open("wb") as file, ThreadPoolExecutor(1) as writer:
            file.write(_header(tensors))
            for tensor in tensors:
                _write_tensor(file, writer, tensor, pieces(tensor))
    if len(shards) > 1:
        index: dict[str, Any] = {
            "metadata": {"total_size": sum(tensor.nbytes for tensors in shards.values() for tensor in tensors)},
            "weight_map": {tensor.name: name for name, tensors in shards.items() for tensor in tensors},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_tensor(
    file: BinaryIO, writer: ThreadPoolExecutor, tensor: TensorInfo, pieces: Iterator[torch.Tensor]
) -> None:
    """Write one piece while the next is computed."""
    written = 0
    pending: Future[int] | None = None
    for piece in pieces:
        values = piece.reshape(-1).view(torch.uint8).numpy()
        if pending:
            written += pending.result()
        pending = writer.submit(file.write, memoryview(values))
    written += pending.result() if pending else 0
    if written != tensor.nbytes:
        raise RuntimeError(f"{tensor.name}: wrote {written} of {tensor.nbytes} bytes")


def _header(tensors: Sequence[TensorInfo]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the values, as the format requires
    return len(text).to_bytes(8, "little") + text
