"""Reads safetensors headers, with size limits checked before memory is allocated."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from loratune.errors import Exit, LoratuneError
from loratune.plain_files import open_plain, reason_of

MOST_BYTES = 100_000_000
"""The format's own limit of a header."""
LENGTH_BYTES = 8
"""Size of the length field at the start of a file."""


def header_text(path: Path) -> bytes:
    """Return the JSON text of the header.

    Raises:
        LoratuneError: the file cannot be read, or is shorter than its header.
    """
    return _text_and_size(path)[0]


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return the offset of the tensors' bytes, and name → dtype, shape and data_offsets of each tensor.

    Raises:
        LoratuneError: the file cannot be read, its header is damaged, or its size does not match the header.
    """
    text, size = _text_and_size(path)
    begin = LENGTH_BYTES + len(text)
    try:
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        places = [place for entry in header.values() for place in entry["data_offsets"]]
        end = max(places, default=0)
        if min(places, default=0) < 0:
            raise ValueError("a tensor begins before the file")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise LoratuneError(f"{path}: its header cannot be read", Exit.MODEL) from error
    if size != begin + end:
        raise LoratuneError(f"{path}: {size} bytes where its header declares {begin + end}; fetch it again", Exit.MODEL)
    return begin, header


def count_values(path: Path) -> int:
    """Return the number of values in all tensors of a file; see `read_header`."""
    return sum(math.prod(entry["shape"]) for entry in read_header(path)[1].values())


def _text_and_size(path: Path) -> tuple[bytes, int]:
    try:
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if size < LENGTH_BYTES or length > min(size - LENGTH_BYTES, MOST_BYTES):
                raise LoratuneError(f"{path}: cut off or not a safetensors file ({size} bytes)", Exit.MODEL)
            return file.read(length), size
    except OSError as error:
        raise LoratuneError(f"{path}: cannot be read: {reason_of(error)}", Exit.MODEL) from error
