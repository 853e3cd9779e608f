"""Literals in Go templates."""

from __future__ import annotations

import json


def literal(text: str) -> str:
    """Return a Go string literal; JSON's escapes are a subset of Go's."""
    return json.dumps(text, ensure_ascii=False)


def written(text: str) -> str:
    """Return an action that writes a text literally, without interpreting actions or trimming whitespace."""
    return "{{ " + literal(text) + " }}" if text else ""
