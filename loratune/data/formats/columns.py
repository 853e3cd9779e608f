"""Error messages for files whose columns match no format: the columns, and the flags that would map them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from loratune.data.formats.registry import ALPACA, Format, renamed
from loratune.nearest import MISSPELT, nearest

# Column names in public datasets for each of Alpaca's columns, the most likely first.
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
    """Describe the columns of a file without a known column of questions or answers, and the flags that map them.

    Args:
        first: the first rows of the file.
        kind: result of `detect_format`.
        columns: name that a format knows → name in the file.

    Returns:
        A sentence; empty if the rows can be read, or are not objects.
    """
    rows = [renamed(value, columns) for value in first if isinstance(value, dict)]
    row: dict[str, Any] = next(iter(rows), {})
    if kind is not ALPACA or not row or (_has_question(rows) and any("output" in one for one in rows)):
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
    """Return the sentence for rows without a list of turns.

    Args:
        row: name of a column → its first value that is not null.
        named: the beginning of the sentence.
        is_preference: whether rows have a chosen and a rejected answer.
    """
    texts = {name for name, value in row.items() if isinstance(value, str | None)}
    # Of a file with answers that has no questions, `input` is blank.
    free = texts - {"input"} if "output" in row else texts
    pairs = {known: next((name for name in names if name in free), "") for known, names in GUESSES.items()}
    misspelt = {
        known: _misspelt([name for name in row if name in free], GUESSES[known])
        for known in ("instruction", "output")
        if not pairs[known]
    }
    pairs |= {known: name for known, (name, _) in misspelt.items()}
    if ("instruction" in row and not pairs["output"]) or ("output" in row and not pairs["instruction"]):
        return ""
    if pairs["instruction"] and pairs["output"]:
        flags = " ".join(
            f"{FLAG} {shlex.quote(f'{known}={name}')}" for known, name in pairs.items() if name and name != known
        )
        if misspelt:
            told = " and ".join(f"{name!r} for {meant!r}" for name, meant in misspelt.values())
            return f"{named}, perhaps misspelt: {told}; correct this in the file, or give {flags}"
        return f"{named}; to train on {pairs['output']!r} as the answer: {flags}"
    plain = next((name for name in TEXT_NAMES if isinstance(row.get(name), str)), None)
    if is_preference:
        return (
            f"{named}; to train on the chosen answers a column with their questions is needed: {FLAG} instruction=… "
            f"{FLAG} output=chosen"
        )
    if plain and not pairs["output"]:
        named += (
            f"; {plain!r} holds plain text, and training on plain text (pretraining) is not offered: loratune trains "
            f"answers to questions, from rows such as {EXAMPLE}"
        )
        if len(row) == 1:
            return named
    return f"{named}; {FLAG} instruction=… {FLAG} output=… names the columns of question and answer"


def _misspelt(columns: Sequence[str], names: Sequence[str]) -> tuple[str, str]:
    """Return the first column that is one of some names misspelt, and that name; empty if there is none."""
    found = ((name, nearest(name, names, MISSPELT)) for name in columns if name not in GUESSES["input"] + TEXT_NAMES)
    return next((one for one in found if one[1]), ("", ""))


def _has_question(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether any of some rows has a column with a question, or a text as its input."""
    return any("instruction" in one or str(one.get("input") or "").strip() for one in rows)


def _key_of_turns(value: Any) -> str:
    """Return `role` or `from` if the value is a list of turns with that key; otherwise an empty string."""
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        return ""
    found = (key for key in ("role", "from") if all(isinstance(turn.get(key), str) for turn in value))
    return next(found, "")
