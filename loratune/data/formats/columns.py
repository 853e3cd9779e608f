"""What to say of a file whose columns no format knows: which there are, and how they could be read."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from loratune.data.formats.registry import ALPACA, Format, renamed

# Names that public files give to what Alpaca calls so; the likeliest first.
GUESSES = {
    "instruction": ("instruction", "question", "prompt", "query", "input"),
    "output": ("output", "answer", "response", "completion", "chosen"),
    "input": ("context",),
}
TEXT_NAMES = ("text", "content")
"""Columns of plain text."""
PREFERENCE = ("chosen", "rejected")
FLAG = "--data.columns"
EXAMPLE = '{"instruction": "…", "output": "…"} or {"messages": [{"role": "user", "content": "…"}, …]}'
NO_PREFERENCE = "preference training (DPO) is not offered"


def describe_unread_columns(first: Sequence[Any], kind: Format, columns: Mapping[str, str]) -> str:
    """Say which columns a file has whose rows hold no answer under a known name, and the flags that would read them.

    Args:
        first: some rows from its beginning.
        kind: from `detect_format`.
        columns: name that a format knows → name in the file.

    Returns:
        A sentence; nothing where the rows can be read, or are no objects at all.
    """
    rows = [renamed(value, columns) for value in first if isinstance(value, dict)]
    row: dict[str, Any] = next(iter(rows), {})
    if kind is not ALPACA or not row or any("output" in one for one in rows):
        return ""
    row = {name: next((one[name] for one in rows if one.get(name) is not None), None) for name in row}
    named = f"its columns are {', '.join(map(repr, row))}, in which no format is recognised"
    is_preference = all(name in row for name in PREFERENCE)
    if is_preference:
        named += f"; {NO_PREFERENCE}"
    turns = [name for name, value in row.items() if _key_of_turns(value)]
    if turns:
        name = "chosen" if is_preference and "chosen" in turns else turns[0]
        known = "messages" if _key_of_turns(row[name]) == "role" else "conversations"
        return f"{named}; to train on the conversations under {name!r}: {FLAG} {known}={name}"
    return _of_texts(row, named, is_preference)


def _of_texts(row: Mapping[str, Any], named: str, is_preference: bool) -> str:
    """The sentence for rows whose columns are no conversations.

    Args:
        row: name of a column → the first value in it that is not null.
        named: the beginning of the sentence.
        is_preference: whether each question has an answer that was chosen and one that was rejected.
    """
    texts = {name for name, value in row.items() if isinstance(value, str | None)}
    pairs = {known: next((name for name in names if name in texts), None) for known, names in GUESSES.items()}
    if "instruction" in row and not pairs["output"]:
        return ""
    if pairs["instruction"] and pairs["output"]:
        flags = " ".join(
            f"{FLAG} {shlex.quote(f'{known}={name}')}" for known, name in pairs.items() if name and name != known
        )
        return f"{named}; to train on {pairs['output']!r} as the answer: {flags}"
    plain = next((name for name in TEXT_NAMES if isinstance(row.get(name), str)), None)
    if is_preference:
        return (
            f"{named}; to train on the chosen answers a column with their questions is needed: {FLAG} instruction=… "
            f"{FLAG} output=chosen"
        )
    if plain and not pairs["output"]:
        named += (
            f"; {plain!r} holds plain text, and training on plain text (pretraining) is not offered: answers to what "
            f"is asked are trained, from rows such as {EXAMPLE}"
        )
        if len(row) == 1:
            return named
    return f"{named}; {FLAG} instruction=… {FLAG} output=… names the columns of question and answer"


def _key_of_turns(value: Any) -> str:
    """`role` or `from` if a value is a list of turns that name their speakers so; else empty."""
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        return ""
    found = (key for key in ("role", "from") if all(isinstance(turn.get(key), str) for turn in value))
    return next(found, "")
