"""The strict JSON decoder for rows, and the messages for its errors."""

from __future__ import annotations

import json
import re
from typing import Any

EXCERPT = 30
"""Number of characters shown before and after an error."""
CLOSED_BEHIND_A_COMMA = re.compile(r",\s*([\]}])")


def explain_fault(name: str, error: Exception, place: tuple[int, int], text: str, index: int) -> str:
    """Return the message for a decoder's error, with its place in the file.

    Args:
        name: name of the file.
        error: raised by DECODER.
        place: line and column in the file.
        text: the text around the error.
        index: index of the error in `text`.
    """
    line, column = place
    if isinstance(error, RecursionError):
        return f"{name}:{line}: nested too deep to be rows"
    if not isinstance(error, json.JSONDecodeError):
        return f"{name}:{line}: {error}"
    excerpt = text[max(0, index - EXCERPT) : index + EXCERPT].replace("\n", "⏎")
    # The error is at the bracket; newer versions of Python place it at the comma.
    comma = index if text.startswith(",", index) else len(text[:index].rstrip()) - 1
    closed = CLOSED_BEHIND_A_COMMA.match(text, max(0, comma))
    remedy = f"; remove the comma before {closed[1]}" if closed else ""
    return f"{name}:{line}:{column}: not valid JSON: {error.msg}, near «{excerpt}»{remedy}"


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {repeated!r} occurs twice in one row")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


DECODER = json.JSONDecoder(object_pairs_hook=_refuse_repeated_keys, parse_constant=_refuse_constant)
