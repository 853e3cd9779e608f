"""The written files, read again and compared with base + update."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from loratune.delivery.merged_weights import MergedTensor, MergePlan, merged_pieces
from loratune.errors import Exit, LoratuneError
from loratune.model.tensor_files import DTYPE_NAMES, INDEX, TensorFiles, TensorInfo

SAMPLED_ROWS = 16
"""Of every updated tensor, spread evenly, first and last among them."""
COMPUTE_ERROR = 1e-5
"""What float32 arithmetic may add to the rounding, relative to the row's largest value."""


@dataclass(frozen=True)
class ReadBack:
    """What the comparison has seen."""

    tensors: int
    identical: int
    """Tensors without an update whose every byte is the base's, or its value rounded to the new type."""
    updated: int
    sampled_rows: int
    """Rows of updated tensors that were computed again in float64."""
    largest_error_steps: float
    """Largest difference from base + update, in rounding steps of the written type; rounding alone makes up to 0.5."""
    unchanged: tuple[str, ...]
    """Updated tensors whose sampled rows still equal the base: the update is smaller than the type can hold."""


def read_back(plan: MergePlan, base: TensorFiles, folder: Path, advance: Callable[[int], None]) -> ReadBack:
    """Compare the written files with what they should hold.

    Args:
        plan: what should have been written.
        base: the base's tensors.
        folder: where the files are.
        advance: told the bytes of each tensor when it has been compared.

    Raises:
        LoratuneError: a file cannot be read, a tensor is missing, or one holds something else.
    """
    _check_index(plan, folder)
    largest, unchanged = 0.0, []
    for file_name, infos in plan.shards.items():
        _check_header(folder / file_name, infos)
        files = TensorFiles([folder / file_name])
        for info in infos:
            tensor, written = plan.tensors[info.name], files.tensor(info.name)
            if tensor.update is None:
                _check_identical(tensor, base, written)
            else:
                error, is_changed = _compare_rows(tensor, base, written)
                largest = max(largest, error)
                unchanged += [] if is_changed else [info.name]
            base.release([tensor.source])
            files.release([info.name])
            advance(info.nbytes)
    updated = len(plan.updated)
    return ReadBack(
        tensors=len(plan.tensors),
        identical=len(plan.tensors) - updated,
        updated=updated,
        sampled_rows=sum(len(_sampled(tensor)) for tensor in plan.updated),
        largest_error_steps=largest,
        unchanged=tuple(unchanged),
    )


def _check_index(plan: MergePlan, folder: Path) -> None:
    if len(plan.shards) == 1:
        return
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    expected = {info.name: name for name, infos in plan.shards.items() for info in infos}
    if index["weight_map"] != expected or index["metadata"]["total_size"] != plan.nbytes:
        raise LoratuneError(f"{INDEX}: does not describe the files beside it", Exit.MODEL)


def _check_header(path: Path, infos: list[TensorInfo]) -> None:
    """Let the safetensors library read what others will read: names, types and shapes, and that no byte is missing."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise LoratuneError(f"{path.name}: cannot be read back: {error}", Exit.MODEL) from error
    if found != {info.name: (DTYPE_NAMES[info.dtype], info.shape) for info in infos}:
        raise LoratuneError(f"{path.name}: holds other tensors than were written to it", Exit.MODEL)


def _check_identical(tensor: MergedTensor, base: TensorFiles, written: torch.Tensor) -> None:
    """Compare bytes, so that NaN equals itself and -0 differs from 0."""
    rows = written if written.ndim else written.reshape(1)
    for start, expected in merged_pieces(tensor, base):
        found = rows[start : start + len(expected)]
        if not torch.equal(_as_bytes(found), _as_bytes(expected)):
            raise _mismatch(tensor, f"other values than the base from row {start} on")


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.contiguous().reshape(-1)
    return flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])


def _compare_rows(tensor: MergedTensor, base: TensorFiles, written: torch.Tensor) -> tuple[float, bool]:
    """Compute sampled rows in float64; (largest error in rounding steps, whether any row differs from the base's)."""
    if tensor.update is None:
        raise RuntimeError(f"{tensor.info.name} has no update")
    largest, is_changed = 0.0, False
    original, source = base.tensor(tensor.source), tensor.values(base)
    for row in _sampled(tensor):
        base_row, found = original[row : row + 1], written[row : row + 1]
        exact = tensor.update.apply(source[row : row + 1].double(), row)
        error = (found.double() - exact).abs() - COMPUTE_ERROR * exact.abs().max()
        steps = float((error / _rounding_step(exact, found.dtype)).max())
        if not steps <= 0.5:  # NaN must not pass
            raise _mismatch(tensor, f"row {row} is {steps:.3g} rounding steps away from base + update")
        largest = max(largest, steps)
        is_changed = is_changed or not torch.equal(found, base_row.to(found.dtype))
    return largest, is_changed


def _rounding_step(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance between neighbouring numbers of a type around some float64 values."""
    limits = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp_min(limits.tiny)).exponent - 1
    return torch.ldexp(torch.ones_like(values), exponent) * limits.eps


def _sampled(tensor: MergedTensor) -> list[int]:
    """Row numbers; of an update that replaces some rows, those are among them."""
    numbers = tensor.update.row_numbers if tensor.update else None
    replaced = [] if numbers is None else numbers.tolist()
    return sorted({place for rows in (range(tensor.info.shape[0]), replaced) for place in _spread(rows)})


def _spread(rows: Sequence[int]) -> list[int]:
    places = torch.linspace(0, len(rows) - 1, min(len(rows), SAMPLED_ROWS)).tolist()
    return [rows[round(place)] for place in places]


def _mismatch(tensor: MergedTensor, found: str) -> LoratuneError:
    return LoratuneError(
        f"{tensor.info.name}: the written file holds {found}; the merged model has been removed. If it happens again, "
        "the disk or the memory of this machine is at fault",
        Exit.MODEL,
    )
