"""Reads a GGUF file back, and compares it with the model folder that it was made from."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from loratune.choices import GgufType
from loratune.delivery.export.gguf.file import BLOCK, DTYPES, FILE_TYPES, STEPS, ModelToWrite, choose_kind
from loratune.delivery.export.gguf.layout import PlannedTensor
from loratune.errors import Exit, LoratuneError
from loratune.runs.exported import GgufReadBack

REMOVED = (
    "it is not kept. See that the disk is well; if a second export ends so too, please report it with the versions "
    "that `loratune --version` and pip list show"
)


def check_gguf(model: Path, file: Path) -> GgufReadBack:
    """Read a file back and compare it with the model folder that it was made from.

    Args:
        model: the folder.
        file: the GGUF file.

    Raises:
        LoratuneError: the file cannot be read, or differs from the folder.
    """
    source = ModelToWrite(model)
    try:
        reader = gguf.GGUFReader(file)
        found = {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, LookupError, OverflowError, OSError) as error:
        raise LoratuneError(f"{file}: cannot be read as GGUF ({error}); {REMOVED}", Exit.MODEL) from error
    quantization = _compare_keys(source, file, reader)
    planned = {tensor.name for tensor in source.tensors}
    if planned != set(found):
        raise _difference(file, min(planned ^ set(found)), "is in only one of file and model")
    sizes: Counter[str] = Counter()
    fallbacks: list[str] = []
    largest = 0.0
    for tensor in source.tensors:
        stored = found[tensor.name]
        kind = choose_kind(tensor, quantization)
        if stored.tensor_type != kind or tuple(reversed(stored.shape.tolist())) != tensor.shape:
            raise _difference(file, tensor.name, f"is {stored.tensor_type.name} {stored.shape.tolist()} in the file")
        largest = max(largest, _compare_values(source, file, tensor, stored))
        sizes[kind.name] += int(stored.n_bytes)
        if quantization == "q8_0" and kind == Kind.F16:
            fallbacks.append(tensor.name)
    tokens = len(source.keys["tokenizer.ggml.tokens"])
    return GgufReadBack(len(found), tokens, dict(sizes), tuple(fallbacks), largest)


def _compare_keys(source: ModelToWrite, file: Path, reader: Any) -> GgufType:
    """Make sure that every key has its value; return the file's quantization."""
    contents = {key: field.contents() for key, field in reader.fields.items() if key != "general.name"}
    for key, value in (source.keys | {"general.architecture": source.architecture}).items():
        expected = float(np.float32(value)) if isinstance(value, float) else value
        if contents.get(key) != expected:
            raise _difference(file, key, "has another value in the file than in the model")
    by_type = {int(file_type): name for name, file_type in FILE_TYPES.items()}
    file_type = contents.get("general.file_type")
    if file_type not in by_type:
        raise _difference(file, "general.file_type", f"is {file_type} in the file")
    return by_type[file_type]


def _compare_values(source: ModelToWrite, file: Path, tensor: PlannedTensor, stored: Any) -> float:
    """Return the largest difference between a tensor's values and the file's; raise if rounding does not explain it."""
    data = stored.data.reshape(-1, stored.data.shape[-1])
    largest, start = 0.0, 0
    for rows in source.rows(tensor):
        # Copied, since float32 values are a read-only view of the file, which torch warns about.
        values = torch.from_numpy(np.array(gguf.dequantize(data[start : start + len(rows)], stored.tensor_type)))
        start += len(rows)
        if not _are_stored(rows, values, stored.tensor_type):
            raise _difference(file, tensor.name, "has other values in the file than in the model")
        largest = max(largest, float((values - rows.float()).abs().max()))
    return largest


def _are_stored(rows: torch.Tensor, values: torch.Tensor, kind: Kind) -> bool:
    """Return whether (rows, row length) values from a file are the given ones with no more than the type's rounding."""
    if kind != Kind.Q8_0:
        return bool(torch.equal(values, rows.to(DTYPES[kind]).float()))
    blocks = rows.float().unflatten(-1, (-1, BLOCK))
    scales = blocks.abs().amax(-1, keepdim=True) / STEPS
    # Half a step, with a margin for the float32 division, and the rounding of the scale.
    allowed = 0.501 * scales + STEPS * (scales.half().float() - scales).abs()
    return bool(((values.view_as(blocks) - blocks).abs() <= allowed).all())


def _difference(file: Path, what: str, how: str) -> LoratuneError:
    return LoratuneError(f"{file}: {what} {how}; {REMOVED}", Exit.MODEL)
