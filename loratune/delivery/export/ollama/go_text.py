"""Texts within a template of Go's."""

from __future__ import annotations

import json


def literal(text: str) -> str:
    """A string literal of Go's; JSON's escapes are among Go's."""
    return json.dumps(text, ensure_ascii=False)


def written(text: str) -> str:
    """The action that writes a text as it is: nothing in it is read as an action, and no space is trimmed."""
    return "{{ " + literal(text) + " }}" if text else ""
