"""Reads the written files back, and compares them with the base and with PEFT's own merge.

Nothing from the writer is used: expected names and values come from the base's files and from PEFT
(`loratune.model.adapter.peft_merge`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from loratune.delivery.merge.merged_weights import PIECE_BYTES, MergePlan
from loratune.delivery.verification.row_check import RowCheck
from loratune.errors import Exit, LoratuneError, agreeing, counted
from loratune.model.architecture.vocabulary import Vocabulary, vocabulary_of
from loratune.model.weights.tensor_files import DTYPE_NAMES, INDEX, TensorFiles, TensorInfo
from loratune.plain_files import read_json_object
from loratune.runs.merged import ReadBack

if TYPE_CHECKING:
    from loratune.model.adapter.peft_merge import Change, PeftMerge

SAMPLED_ROWS = 16
"""Rows of every updated tensor that are also computed in float64, evenly spaced, including the first and last."""
SAMPLED_VALUES = 10_000_000
"""Maximum values of those, where the rows of a tensor are whole matrices; two of them are sampled in any case."""


class Compared(NamedTuple):
    """What comparing an updated tensor has seen."""

    rows: int
    sampled_rows: int
    is_changed: bool
    """Whether any value differs from the base's."""


def read_back(
    plan: MergePlan,
    peft: PeftMerge,
    base: TensorFiles,
    folder: Path,
    advance: Callable[[int], None],
    dtype: torch.dtype | None = None,
) -> ReadBack:
    """Compare the written files with their expected content.

    Args:
        plan: file, dtype and shape of every tensor.
        peft: PEFT's reading of the adapter.
        base: the base's tensors.
        folder: folder of the files.
        advance: called with the bytes of each compared tensor.
        dtype: requested dtype; None for each tensor's own.

    Raises:
        LoratuneError: a file cannot be read, or a tensor is missing or different.
    """
    _check_index(plan, folder)
    _check_names(plan, peft, base, dtype)
    check, compared = RowCheck(), list[tuple[str, Compared]]()
    identical, converted, updated = 0, 0, 0
    vocabulary = vocabulary_of(base.infos)
    for file_name, infos in plan.shards.items():
        _check_header(folder / file_name, infos)
        files = TensorFiles([folder / file_name])
        for info in infos:
            source = vocabulary.embedding if info.name == vocabulary.head and peft.is_tied else info.name
            changes = [peft.changes.get(name) for name in _stands_for(info.name, vocabulary, plan)]
            for change in changes if any(changes) else [None]:
                if change:
                    compared.append((info.name, _compare_changed(info, change, (base, source), files, check)))
                else:
                    _compare_kept(info, base, source, files.tensor(info.name))
            identical += not any(changes)
            converted += not any(changes) and info.dtype != base.infos[source].dtype
            updated += any(changes)
            base.release([source])
            files.release([info.name])
            advance(info.nbytes)
    return ReadBack(
        tensors=len(plan.tensors),
        identical=identical,
        converted=converted,
        updated=updated,
        rows=sum(one.rows for _, one in compared),
        sampled_rows=sum(one.sampled_rows for _, one in compared),
        largest_error_steps=check.largest_steps,
        largest_forward_error=check.largest_forward_error,
        lost_to_rounding=check.lost_to_rounding,
        unchanged=tuple(name for name, one in compared if not one.is_changed),
    )


def _stands_for(name: str, vocabulary: Vocabulary, plan: MergePlan) -> tuple[str, ...]:
    """Return which of the base's tensors a written one represents: a tied embedding is also the head."""
    return vocabulary if name == vocabulary.embedding and plan.is_tied else (name,)


def _check_names(plan: MergePlan, peft: PeftMerge, base: TensorFiles, dtype: torch.dtype | None) -> None:
    """Check that the base's tensors were written, with the right dtypes, and changed only where PEFT changes them."""
    embedding, head = vocabulary_of(base.infos)
    expected = {*base.infos, *((head,) if not plan.is_tied else ())} - ({head} if plan.is_tied else set())
    problems = [f"{name} was not written" for name in sorted(expected - plan.tensors.keys())]
    problems += [f"{name} was written, and the base has none" for name in sorted(plan.tensors.keys() - expected)]
    updated = {tensor.info.name for tensor in plan.updated}
    changed = peft.changes.keys() - ({head} if plan.is_tied else set())
    problems += [f"{name} was not changed, and PEFT changes it" for name in sorted(changed - updated)]
    problems += [f"{name} was changed, and PEFT leaves it as it is" for name in sorted(updated - changed)]
    for name in sorted(expected & plan.tensors.keys()):
        own = base.infos[embedding if name == head and peft.is_tied else name].dtype
        asked = dtype if dtype is not None and own.is_floating_point else own
        if plan.tensors[name].info.dtype != asked:
            problems.append(f"{name} was written as {plan.tensors[name].info.dtype}, and {asked} was asked for")
    if problems:
        raise LoratuneError(
            f"{counted(len(problems), 'tensor of the merged model')} {agreeing(len(problems), 'are not')} what PEFT "
            f"makes of this adapter, first: {problems[0]}. Please report this with what pip list shows",
            Exit.MODEL,
        )


def _check_index(plan: MergePlan, folder: Path) -> None:
    if len(plan.shards) == 1:
        return
    index = read_json_object(folder / INDEX)
    expected = {info.name: name for name, infos in plan.shards.items() for info in infos}
    if index["weight_map"] != expected or index["metadata"]["total_size"] != plan.nbytes:
        raise LoratuneError(f"{INDEX}: does not describe the files beside it", Exit.MODEL)


def _check_header(path: Path, infos: list[TensorInfo]) -> None:
    """Check names, dtypes, shapes and completeness with the safetensors library, as other programs will read them."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise LoratuneError(f"{path.name}: cannot be read back: {error}", Exit.MODEL) from error
    if found != {info.name: (DTYPE_NAMES[info.dtype], info.shape) for info in infos}:
        raise LoratuneError(f"{path.name}: holds other tensors than were written to it", Exit.MODEL)
    if metadata.get("format") != "pt":  # required by transformers before version 5
        raise LoratuneError(f"{path.name}: the written file holds no note that its tensors are PyTorch's", Exit.MODEL)


def _compare_kept(info: TensorInfo, base: TensorFiles, source: str, written: torch.Tensor) -> None:
    """Compare bytes, so that NaN equals itself and -0 differs from 0."""
    for rows, found, original in _pieces(written, base.tensor(source)):
        if not torch.equal(as_bytes(found), as_bytes(original.to(found.dtype))):
            raise _mismatch(info.name, f"other values than the base from {_part(written)} {rows.start} on")
        base.release([source])


def _compare_changed(
    info: TensorInfo,
    change: Change,
    source: tuple[TensorFiles, str],
    files: TensorFiles,
    check: RowCheck,
) -> Compared:
    """Compare all rows with PEFT's, and some with PEFT's in float64."""
    base, name = source
    written, before = files.tensor(info.name), base.tensor(name)
    original = before if change.replacement is None else change.replacement
    if original.shape != written.shape:
        raise _mismatch(info.name, f"a shape of {list(written.shape)} where PEFT has {list(original.shape)}")
    dtype = torch.float64 if change.needs_float64 else torch.float32
    is_changed = before.shape != written.shape
    for rows, values, lent in _pieces(written, original):
        numbers = torch.arange(rows.start, rows.stop)
        merged = change.rows(lent.to(dtype), numbers)
        wrong = check.first_wrong_row(values, merged, change.tolerance(merged, numbers))
        if wrong is not None:
            place, steps = rows.start + wrong.place, f"{wrong.steps:.3g} rounding steps"
            raise _mismatch(info.name, f"{_part(written)} {place} wrongly, {steps} away from PEFT's")
        is_changed = is_changed or not torch.equal(as_bytes(values), as_bytes(before[rows].to(values.dtype)))
        base.release([name])
        files.release([info.name])
    numbers = torch.tensor(_spread(range(len(written)), math.prod(written.shape[1:])))
    problem = check.sample(change, original[numbers], written[numbers], before, numbers)
    if problem:
        raise _mismatch(info.name, problem)
    return Compared(len(written), len(numbers), is_changed)


def _pieces(written: torch.Tensor, original: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield row numbers and both tensors' rows, some at a time."""
    if not written.ndim:
        written, original = written.reshape(1), original.reshape(1)
    step = max(1, PIECE_BYTES // (4 * max(1, math.prod(written.shape[1:]))))
    for start in range(0, len(written), step):
        rows = slice(start, min(start + step, len(written)))
        yield rows, written[rows], original[rows]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bits of values as integers."""
    flat = tensor.contiguous().reshape(-1)
    return flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])


def _spread(rows: Sequence[int], row_values: int) -> list[int]:
    count = SAMPLED_ROWS if row_values * SAMPLED_ROWS <= SAMPLED_VALUES else max(2, SAMPLED_VALUES // row_values)
    places = torch.linspace(0, len(rows) - 1, min(len(rows), count)).tolist()
    return sorted({rows[round(place)] for place in places})


def _part(values: torch.Tensor) -> str:
    """Return what messages call a part of a tensor along its first axis."""
    return "matrix" if values.ndim == 3 else "row"


def _mismatch(name: str, found: str) -> LoratuneError:
    return LoratuneError(f"{name}: the written file holds {found}", Exit.MODEL)
