"""JSON objects from files that others have made: bounded in size and depth, with one message for each way they fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loratune.errors import Exit, LoratuneError

CONFIG_BYTES = 20_000_000
"""More than any config takes; a chat template inside of one is some 100 kB."""


def read_json_object(path: Path, most_bytes: int | None = None) -> dict[str, Any]:
    """The object that a file holds.

    Args:
        path: the file.
        most_bytes: that it may have; None for any number.

    Raises:
        LoratuneError: the file is not there, too large, no JSON, nested too deeply, or holds something else.
    """
    try:
        size = path.stat().st_size
        if most_bytes is not None and size > most_bytes:
            raise LoratuneError(
                f"{path}: {size:,} bytes, where {most_bytes:,} are the most that is read; fetch it again", Exit.MODEL
            )
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoratuneError(f"{path}: cannot be read: {error}", Exit.MODEL) from error
    except RecursionError as error:
        raise LoratuneError(f"{path}: cannot be read: nested too deeply; fetch it again", Exit.MODEL) from error
    if not isinstance(value, dict):
        raise LoratuneError(f"{path}: holds no JSON object", Exit.MODEL)
    return value
