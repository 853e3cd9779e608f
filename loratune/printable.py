"""Makes text from models and files safe for terminals by removing or escaping control characters."""

from __future__ import annotations

import json
import re
from typing import Any
from unicodedata import combining, east_asian_width

# All control characters but tab and line feed, and those that change the writing direction.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


LONGEST_PATH = 300
"""Characters of a path that may not exist, in a message."""


def printable(text: str) -> str:
    """Remove control characters."""
    return UNPRINTABLE.sub("", text)


def visible(text: str) -> str:
    """Replace each control character with a visible symbol, such as ␛ for escape."""

    def sign(match: re.Match[str]) -> str:
        code = ord(match[0])
        return "␡" if code == 0x7F else chr(0x2400 + code) if code < 0x20 else f"⟨{code:04X}⟩"

    return UNPRINTABLE.sub(sign, text)


def width_of(text: str) -> int:
    """Return the columns that a text takes in a terminal, where Chinese characters take two."""
    return sum(0 if combining(letter) else 2 if east_asian_width(letter) in "WF" else 1 for letter in text)


def shortened(text: str, limit: int = 60) -> str:
    """Return a text, or its beginning if it is longer than a message should quote."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def as_far_as_said(answer: str, has_ended: bool | None) -> str:
    """Return an answer with an ellipsis behind it if it was cut before its end; None where that is not known."""
    return f"{answer} …" if has_ended is False else answer


def printable_json(value: Any, is_ascii: bool = False) -> str:
    """Return a value as indented JSON with control characters escaped.

    Args:
        value: JSON types.
        is_ascii: escape all non-ASCII characters too.
    """
    text = json.dumps(value, ensure_ascii=is_ascii, indent=2)
    return UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
