"""Rows → conversations, whatever format a file is in; every row is checked, and all problems are told at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from loratune.data import alpaca, chat_rows
from loratune.data.conversation import Conversation, Message, kind_of
from loratune.data.sources import Row
from loratune.errors import Exit, LoratuneError, bullet_list

PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")
# The two placeholders that published identity data uses; others may be meant literally.
MUST_BE_FILLED = ("name", "author")


@dataclass(frozen=True)
class Format:
    """How one kind of row is read."""

    name: str
    keys: tuple[str, ...]
    """A file whose first row has them is in this format."""
    needs: str
    """What its rows have to hold, for an error."""
    problems: Callable[[dict[str, Any]], list[str]]
    messages: Callable[[dict[str, Any]], list[Message]]
    untrained: Callable[[dict[str, Any]], frozenset[int]] = lambda _: frozenset()
    columns: Mapping[str, str] | None = None
    """Its names of Alpaca's columns, for pairs that are called something else."""


ALPACA = Format("alpaca", ("instruction",), alpaca.NEEDS, alpaca.problems, alpaca.messages)
FORMATS = (
    Format(
        "messages", ("messages",), chat_rows.MESSAGES_NEED, chat_rows.problems_of_messages, chat_rows.from_messages,
        chat_rows.untrained_messages,
    ),
    Format(
        "sharegpt", ("conversations",), chat_rows.SHAREGPT_NEEDS, chat_rows.problems_of_sharegpt,
        chat_rows.from_sharegpt,
    ),
    ALPACA,
    Format(
        "prompt and completion", ("prompt", "completion"), "each row needs the texts 'prompt' and 'completion'",
        alpaca.problems, alpaca.messages, columns={"instruction": "prompt", "output": "completion"},
    ),
    Format(
        "query and response", ("query", "response"), "each row needs the texts 'query' and 'response'",
        alpaca.problems, alpaca.messages, columns={"instruction": "query", "output": "response"},
    ),
)  # fmt: skip


def read_conversations(
    rows: list[Row], placeholders: Mapping[str, str], columns: Mapping[str, str] | None = None
) -> list[Conversation]:
    """Turn the rows of a file into conversations.

    `{{name}}` in any text becomes the placeholder's value.

    Args:
        rows: of one file, all in the format of the first.
        placeholders: name → value.
        columns: name that a format knows → name in the file.

    Raises:
        LoratuneError: with the places of all rows that do not fit.
    """
    kind = detect_format(rows, columns)
    fill = _Filler(placeholders)
    conversations, problems = [], []
    for row in rows:
        value = _renamed(_renamed(row.value, columns), kind.columns)
        is_object = isinstance(value, dict)
        found = kind.problems(value) if is_object else [f"is {kind_of(value)}, not an object"]
        if found:
            problems.append(f"{row.place}: {'; '.join(_in_file_s_words(problem, kind) for problem in found)}")
        else:
            turns = tuple(_filled(message, fill) for message in kind.messages(value))
            conversations.append(Conversation(turns, row.place, kind.untrained(value)))
    if problems:
        raise LoratuneError(
            f"{len(problems)} of {len(rows)} rows cannot be trained on:\n{bullet_list(problems, limit=5)}\n"
            f"{kind.needs}; mend or remove these rows",
            Exit.DATA,
        )
    fill.check()
    return conversations


def detect_format(rows: list[Row], columns: Mapping[str, str] | None = None) -> Format:
    """The format of a file's first row; Alpaca if it looks like none, whose errors say what is missing."""
    first = _renamed(rows[0].value, columns) if rows else None
    keys = first.keys() if isinstance(first, dict) else set()
    return next((kind for kind in FORMATS if all(key in keys for key in kind.keys)), ALPACA)


def _renamed(value: Any, columns: Mapping[str, str] | None) -> Any:
    """A row under the names that a format knows."""
    if not isinstance(value, dict) or not columns:
        return value
    rest = {key: inner for key, inner in value.items() if key not in columns.values()}
    return rest | {known: value[own] for known, own in columns.items() if own in value}


def _in_file_s_words(problem: str, kind: Format) -> str:
    for known, own in (kind.columns or {}).items():
        problem = problem.replace(f"'{known}'", f"'{own}'")
    return problem


def _filled(message: Message, fill: _Filler) -> Message:
    return {"role": message["role"], "content": fill(message["content"])}


class _Filler:
    """Fills placeholders, whatever their case, and remembers those that had to be filled but were not given."""

    def __init__(self, placeholders: Mapping[str, str]) -> None:
        self.values = {name.lower(): value for name, value in placeholders.items()}
        self.missing: set[str] = set()

    def __call__(self, text: str) -> str:
        return PLACEHOLDER.sub(self._value, text)

    def _value(self, match: re.Match[str]) -> str:
        name = match[1].lower()
        if name not in self.values and name in MUST_BE_FILLED:
            self.missing.add(name)
        return self.values.get(name, match[0])

    def check(self) -> None:
        """Refuse placeholders that have no value.

        Raises:
            LoratuneError: with the flags that would give them.
        """
        if self.missing:
            flags = " ".join(f"--data.placeholders {name}=…" for name in sorted(self.missing))
            raise LoratuneError(
                f"rows hold {', '.join('{{' + name + '}}' for name in sorted(self.missing))}; "
                f"give values in data.placeholders, or as {flags}",
                Exit.DATA,
            )
