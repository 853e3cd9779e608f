"""Error messages for files whose columns match no format: the columns, and the flags that would map them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from loratune.data.formats.registry import ALPACA, FORMATS, Format, renamed
from loratune.nearest import MISSPELT, nearest

# Column names for each of Alpaca's columns, in public datasets and in some languages, the most likely first.
GUESSES = {
    "instruction": (
        *("instruction", "question", "prompt", "query", "frage", "pregunta", "pergunta", "domanda", "vraag", "вопрос"),
        *("问题", "提问", "問題", "質問", "질문", "input"),
    ),
    "output": (
        *("output", "answer", "response", "completion", "chosen", "antwort", "réponse", "reponse", "respuesta"),
        *("resposta", "risposta", "antwoord", "ответ", "答案", "回答", "답변"),
    ),
    "input": ("context",),
}
TEXT_NAMES = ("text", "content")
"""Columns of plain text."""
PREFERENCE = ("chosen", "rejected")
NUMBERS = ("", "id", "idx", "index", "no", "nr", "row", "unnamed: 0")
"""Columns of a row's number, which are texts in CSV."""
FLAG = "--data.columns"
FURTHER = ("output", "input", "system", "history", "tools")
"""Names that formats know beside the keys by which they are detected."""
QUESTIONS, ANSWERS = "QUESTIONS", "ANSWERS"
"""What stands for the name of a column that is not known."""
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
    names = {*FURTHER, *(key for one in FORMATS for key in (*one.keys, *(one.columns or {}).values()))}
    own = [value for value in first if isinstance(value, dict)]
    rows = [renamed(value, {name: column for name, column in columns.items() if name in names}) for value in own]
    row: dict[str, Any] = next(iter(rows), {})
    if kind is not ALPACA or not row or (_has_question(rows) and any("output" in one for one in rows)):
        return ""
    row = {name: next((one[name] for one in rows if one.get(name) is not None), None) for name in row}
    named = f"its columns are {', '.join(map(repr, own[0]))}, in which no format is recognised"
    if any(name not in names or column not in own[0] for name, column in columns.items()):
        named += f", also not with data.columns {' '.join(f'{name}={column}' for name, column in columns.items())}"
    is_preference = all(name in row for name in PREFERENCE)
    if is_preference:
        named += f"; {NO_PREFERENCE}"
    turns = [name for name, value in row.items() if _key_of_turns(value)]
    if turns:
        name = "chosen" if is_preference and "chosen" in turns else turns[0]
        known = "messages" if _key_of_turns(row[name]) == "role" else "conversations"
        return f"{named}; to train on the conversations under {name!r}: {FLAG} {known}={name}"
    return _of_texts(row, named, is_preference, columns)


def _of_texts(row: Mapping[str, Any], named: str, is_preference: bool, columns: Mapping[str, str]) -> str:
    """Return the sentence for rows without a list of turns.

    Args:
        row: name of a column → its first value that is not null.
        named: the beginning of the sentence.
        is_preference: whether rows have a chosen and a rejected answer.
        columns: see `describe_unread_columns`; the row has its names, and the sentence those of the file.
    """
    texts = {name for name, value in row.items() if isinstance(value, str | None)}
    # Of a file with answers that has no questions, `input` is blank.
    free = texts - {"input"} if "output" in row else texts
    folded = {name.casefold(): name for name in reversed([*row]) if name in free}
    pairs = {known: next((folded[name] for name in names if name in folded), "") for known, names in GUESSES.items()}
    misspelt = {
        known: found
        for known in ("instruction", "output")
        if not pairs[known] and (found := _misspelt([name for name in row if name in free], GUESSES[known]))[0]
    }
    pairs |= {known: name for known, (name, _) in misspelt.items()}
    if ("instruction" in row and not pairs["output"]) or ("output" in row and not pairs["instruction"]):
        return ""
    plain = next((name for name in TEXT_NAMES if isinstance(row.get(name), str)), None)
    likely = {} if plain else _left_over({name: row[name] for name in row if name in free}, pairs)
    pairs = {known: columns.get(name, name) for known, name in (pairs | likely).items()}
    if pairs["instruction"] and pairs["output"]:
        flags = _flags(pairs)
        if misspelt:
            told = " and ".join(f"{name!r} for {meant!r}" for name, meant in misspelt.values())
            return f"{named}, perhaps misspelt: {told}; correct this in the file, or give {flags}"
        if likely:
            return f"{named}; if {pairs['instruction']!r} has questions and {pairs['output']!r} answers: {flags}"
        return f"{named}; to train on {pairs['output']!r} as the answer: {flags}"
    if is_preference:
        needed = "to train on the chosen answers a column with their questions is needed"
        return f"{named}; {needed}: {_flags({'instruction': QUESTIONS, 'output': 'chosen'})}"
    if plain and not pairs["output"]:
        named += (
            f"; {plain!r} holds plain text, and training on plain text (pretraining) is not offered: loratune trains "
            f"answers to questions, from rows such as {EXAMPLE}"
        )
        if len(row) == 1:
            return named
    flags = _flags({"instruction": pairs["instruction"] or QUESTIONS, "output": pairs["output"] or ANSWERS})
    return f"{named}; name the columns of questions and answers: {flags}"


def _flags(pairs: Mapping[str, str]) -> str:
    """Return the flags that map names of a format to columns of a file."""
    return " ".join(
        f"{FLAG} {shlex.quote(f'{known}={name}')}" for known, name in pairs.items() if name and name != known
    )


def _left_over(texts: Mapping[str, Any], pairs: Mapping[str, str]) -> dict[str, str]:
    """Return the columns of question and answer that have no known name, if no other column can be meant."""
    missing = [known for known in ("instruction", "output") if not pairs[known]]
    taken = (*pairs.values(), *PREFERENCE)
    rest = [name for name, value in texts.items() if value and name not in taken and name.casefold() not in NUMBERS]
    return dict(zip(missing, rest, strict=True)) if len(missing) == len(rest) else {}


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
