"""Rows → conversations, whatever format a file is in; every row is checked, and all problems are told at once."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loratune.data import alpaca, chat_rows
from loratune.data.conversation import Conversation, Message, kind_of
from loratune.errors import Exit, LoratuneError

PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")
MEDIA = {
    "image": "a picture", "images": "pictures", "video": "a video", "videos": "videos", "audio": "sound",
    "audios": "sound",
}  # fmt: skip
# Names that public files give to what Alpaca calls so; the likeliest first.
COLUMN_GUESSES = {
    "instruction": ("instruction", "question", "prompt", "query", "input"),
    "output": ("output", "answer", "response", "completion", "chosen"),
    "input": ("context",),
}
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
    known: frozenset[str]
    """Keys that it reads; others are ignored."""
    turns: str = ""
    """Key of the list of turns, if it has one."""
    turn_keys: frozenset[str] = frozenset()
    """Keys of a turn that it reads."""
    untrained: Callable[[dict[str, Any]], frozenset[int]] = lambda _: frozenset()
    tools: Callable[[dict[str, Any]], tuple[dict[str, Any], ...]] = lambda _: ()
    columns: Mapping[str, str] | None = None
    """Its names of Alpaca's columns, for pairs that are called something else."""


_ALPACA_KEYS = frozenset(alpaca.KEYS)
ALPACA = Format("alpaca", ("instruction",), alpaca.NEEDS, alpaca.problems, alpaca.messages, _ALPACA_KEYS)
FORMATS = (
    Format(
        "messages", ("messages",), chat_rows.MESSAGES_NEED, chat_rows.problems_of_messages, chat_rows.from_messages,
        frozenset({"messages", "tools", "functions"}), "messages", chat_rows.MESSAGE_KEYS,
        chat_rows.untrained_messages, chat_rows.tools_of,
    ),
    Format(
        "sharegpt", ("conversations",), chat_rows.SHAREGPT_NEEDS, chat_rows.problems_of_sharegpt,
        chat_rows.from_sharegpt, frozenset({"conversations", "system", "tools", "functions"}), "conversations",
        chat_rows.SHAREGPT_KEYS, chat_rows.untrained_sharegpt, chat_rows.tools_of,
    ),
    ALPACA,
    Format(
        "prompt and completion", ("prompt", "completion"), "each row needs the texts 'prompt' and 'completion'",
        alpaca.problems, alpaca.messages, _ALPACA_KEYS, columns={"instruction": "prompt", "output": "completion"},
    ),
    Format(
        "query and response", ("query", "response"), "each row needs the texts 'query' and 'response'",
        alpaca.problems, alpaca.messages, _ALPACA_KEYS, columns={"instruction": "query", "output": "response"},
    ),
)  # fmt: skip


class ConversationReader:
    """Turns the rows of one file into conversations, all in one format.

    `{{name}}` in any text becomes the placeholder's value.

    Args:
        kind: the format.
        placeholders: name → value.
        columns: name that a format knows → name in the file.
        system: system prompt for rows without one.
    """

    def __init__(
        self, kind: Format, placeholders: Mapping[str, str], columns: Mapping[str, str], system: str | None = None
    ) -> None:
        self.kind = kind
        self.ignored: set[str] = set()
        """Keys of the rows read so far that say nothing to this format."""
        self._columns = columns
        self._system: tuple[Message, ...] = ({"role": "system", "content": system},) if system else ()
        self._fill = _Filler(placeholders)

    def read(self, given: Any) -> Conversation | str:
        """The conversation of a row, or what keeps the row from being trained on."""
        value = _renamed(_renamed(given, self._columns), self.kind.columns)
        found = [f"is {kind_of(value)}, not an object"]
        if isinstance(value, dict):
            found = _media_problems(value) or self.kind.problems(value)
        if found:
            return "; ".join(_in_file_s_words(problem, self.kind) for problem in found)
        self.ignored.update(value.keys() - self.kind.known)
        self.ignored.update(_unknown_in_turns(value, self.kind))
        turns = tuple(_filled(message, self._fill) for message in self.kind.messages(value))
        is_set = turns[0]["role"] == "system"
        added = () if is_set else self._system
        untrained = frozenset(place + len(added) for place in self.kind.untrained(value))
        return Conversation((*added, *turns), untrained, self.kind.tools(value))

    def check_placeholders(self) -> None:
        """Refuse placeholders that rows hold and that have no value.

        Raises:
            LoratuneError: with the flags that would give them.
        """
        self._fill.check()


def detect_format(first: Iterable[Any], columns: Mapping[str, str]) -> Format:
    """The format of a file by the first of its rows that is in any.

    Args:
        first: some rows from its beginning.
        columns: name that a format knows → name in the file.

    Returns:
        The format; Alpaca if no row is in any, whose errors say what is missing.
    """
    for value in first:
        row = _renamed(value, columns)
        for kind in FORMATS:
            if isinstance(row, dict) and all(key in row for key in kind.keys):
                return kind
    return ALPACA


def describe_unread_columns(first: Iterable[Any], kind: Format, columns: Mapping[str, str]) -> str:
    """Say which columns a file has whose rows hold no answer under a known name, and the flags that would read them.

    Args:
        first: some rows from its beginning.
        kind: from `detect_format`.
        columns: name that a format knows → name in the file.

    Returns:
        A sentence; nothing where the rows can be read, or are no objects at all.
    """
    row = next((value for value in first if isinstance(value, dict)), None)
    if kind is not ALPACA or row is None or {"instruction", "output"} <= _renamed(row, columns).keys():
        return ""
    if not row or any(_renamed(value, columns).keys() & {"output"} for value in first if isinstance(value, dict)):
        return ""
    named = f"its columns are {', '.join(map(repr, row))}, in which no format is recognised"
    pairs = {known: next((name for name in names if name in row), None) for known, names in COLUMN_GUESSES.items()}
    if "instruction" in row and not pairs["output"]:
        return ""
    if not all(pairs[known] for known in ("instruction", "output")):
        return (
            f"{named}; name those of question and answer with --data.columns instruction=COLUMN --data.columns "
            "output=COLUMN"
        )
    flags = " ".join(
        f"--data.columns {shlex.quote(f'{known}={name}')}" for known, name in pairs.items() if name and name != known
    )
    return f"{named}; to train on {pairs['output']!r} as the answer: {flags}"


def _media_problems(row: dict[str, Any]) -> list[str]:
    """A row about a picture would be trained as a text with a literal <image> in it."""
    held = [key for key in MEDIA if row.get(key) not in (None, "", [], {})]
    return [f"{key!r} holds {MEDIA[key]}, and only texts are trained here" for key in held]


def _unknown_in_turns(row: dict[str, Any], kind: Format) -> set[str]:
    turns = row[kind.turns] if kind.turns else []
    names = {key for turn in turns for key, value in turn.items() if value is not None}
    return {f"{kind.turns}[].{key}" for key in names - kind.turn_keys}


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
    filled: Message = {**message, "content": fill(message["content"])}
    if "tool_calls" in message:
        filled["tool_calls"] = fill.all_texts(message["tool_calls"])
    return filled


class _Filler:
    """Fills placeholders, whatever their case, and remembers those that had to be filled but were not given."""

    def __init__(self, placeholders: Mapping[str, str]) -> None:
        self.values = {name.lower(): value for name, value in placeholders.items()}
        self.missing: set[str] = set()

    def __call__(self, text: str) -> str:
        return text if "{{" not in text else PLACEHOLDER.sub(self._value, text)

    def all_texts(self, value: Any) -> Any:
        """A JSON value with every text in it filled; keys stay."""
        if isinstance(value, dict):
            return {key: self.all_texts(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.all_texts(inner) for inner in value]
        return self(value) if isinstance(value, str) else value

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
            flags = " ".join(f"--data.placeholders {shlex.quote(f'{name}=TEXT')}" for name in sorted(self.missing))
            raise LoratuneError(
                f"rows hold {', '.join('{{' + name + '}}' for name in sorted(self.missing))}; "
                f"give values in data.placeholders, or as {flags}",
                Exit.DATA,
            )
