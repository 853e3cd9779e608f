"""The table of formats, their detection, and the reader that checks rows and reports all problems at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from loratune.data.formats import alpaca, prompt_rows
from loratune.data.formats.asked_rows import with_last_turn, with_output
from loratune.data.formats.chat_rows import CONVERSATIONS, MESSAGES, ChatRows
from loratune.data.formats.conversation import Conversation, Message, kind_of
from loratune.data.formats.placeholders import Filler
from loratune.data.formats.row_media import named_media, referred_media
from loratune.data.formats.row_tools import tools_of
from loratune.nearest import MISSPELT, nearest

NAMED_FIRST = re.compile(r"'(\w+)' is ")
"""Matches the column that a problem begins with."""


@dataclass(frozen=True)
class Format:
    """How rows of one format are recognised and read."""

    name: str
    keys: tuple[str, ...]
    """Keys that the first rows of a file in this format have."""
    needs: str
    """What each row needs, for error messages."""
    problems: Callable[[dict[str, Any]], list[str]]
    messages: Callable[[dict[str, Any]], list[Message]]
    unread: Callable[[dict[str, Any]], dict[str, Any]]
    """Columns of a row, and keys of its turns, that nothing is taken from, with what they hold."""
    asks: str
    """What a row has to hold as a question, for an error."""
    answered: Callable[[dict[str, Any]], dict[str, Any]]
    """A row, of this format or not, with an empty answer where a question has none."""
    untrained: Callable[[dict[str, Any]], frozenset[int]] = lambda _: frozenset()
    tools: Callable[[dict[str, Any]], tuple[dict[str, Any], ...]] = lambda _: ()
    columns: Mapping[str, str] | None = None
    """The format's names for Alpaca's columns."""
    fits: Callable[[dict[str, Any]], bool] = lambda _: True
    """Decides whether a row with the keys is in this format, if other formats have the same keys."""

    def is_of(self, row: dict[str, Any]) -> bool:
        """Whether a row is in this format, well formed or not."""
        return all(key in row for key in self.keys) and self.fits(row)


def _texts(name: str, keys: tuple[str, ...], columns: Mapping[str, str] | None = None) -> Format:
    named = columns or {"instruction": "instruction", "output": "output"}
    question, answer = named["instruction"], named["output"]
    return Format(
        name,
        keys,
        needs=f"each row needs the texts {question!r} and {answer!r}",
        problems=alpaca.problems,
        messages=alpaca.messages,
        unread=alpaca.unread,
        asks=f"a text {question!r}",
        answered=partial(with_output, answer=answer),
        columns=columns,
    )


def _pairs(question: str, answer: str) -> Format:
    return _texts(f"{question} and {answer}", (question, answer), {"instruction": question, "output": answer})


def _chat(name: str, rows: ChatRows) -> Format:
    return Format(
        name,
        (rows.key,),
        needs=rows.needs,
        problems=rows.problems,
        messages=rows.messages,
        unread=rows.unread,
        asks=f"a list {rows.key!r}",
        answered=partial(with_last_turn, rows=rows),
        untrained=rows.untrained,
        tools=tools_of,
    )


CONVERSATIONAL = Format(
    "conversational prompt and completion",
    prompt_rows.LISTS,
    needs=prompt_rows.NEEDS,
    problems=prompt_rows.problems,
    messages=prompt_rows.messages,
    unread=prompt_rows.unread,
    asks=f"a list {prompt_rows.PROMPT.key!r}",
    answered=prompt_rows.answered,
    untrained=prompt_rows.untrained,
    tools=tools_of,
    fits=prompt_rows.has_lists,
)
ALPACA = _texts("alpaca", ("instruction",))
FORMATS = (
    _chat("messages", MESSAGES),
    _chat("sharegpt", CONVERSATIONS),
    ALPACA,
    CONVERSATIONAL,
    _pairs("prompt", "completion"),
    _pairs("query", "response"),
)


class ConversationReader:
    """Converts the rows of one file, all in one format, into conversations.

    `{{name}}` in any text is replaced with the placeholder's value.

    Args:
        kind: the format.
        placeholders: name → value.
        columns: name that a format knows → name in the file.
        system: system prompt for rows without one.
        are_questions: whether the last answer may be missing; it is empty then.
    """

    def __init__(
        self,
        kind: Format,
        placeholders: Mapping[str, str],
        columns: Mapping[str, str],
        system: str | None = None,
        are_questions: bool = False,
    ) -> None:
        self.kind = kind
        self._are_questions = are_questions
        self.ignored: set[str] = set()
        """Unused keys of the rows read so far."""
        self._columns = columns
        self.fill = Filler(placeholders)
        """Records the placeholders of the rows read so far."""
        self._system: tuple[Message, ...] = ({"role": "system", "content": self.fill(system)},) if system else ()

    def read(self, given: Any) -> Conversation | str:
        """Return the conversation of a row, or the reasons why it cannot be trained on."""
        try:
            return self._read(given)
        except RecursionError:  # checks recurse as deep as the values nest
            return "its values are nested too deep to be checked"

    def _read(self, given: Any) -> Conversation | str:
        value = row = renamed(given, self._columns)
        value = self.kind.answered(value) if self._are_questions and isinstance(value, dict) else value
        value = renamed(value, self.kind.columns)
        found = [f"is {kind_of(value)}, not an object"]
        if isinstance(value, dict):
            found = named_media(value) or self.kind.problems(value)
        unread = {} if found else self.kind.unread(value)
        found = found or referred_media(unread, value)
        if found:
            return "; ".join(_in_file_s_words(problem, self.kind, row) for problem in found)
        self.ignored.update(unread)
        turns = tuple(_filled(message, self.fill) for message in self.kind.messages(value))
        is_set = turns[0]["role"] == "system"
        added = () if is_set else self._system
        untrained = frozenset(place + len(added) for place in self.kind.untrained(value))
        return Conversation((*added, *turns), untrained, self.kind.tools(value))


def detect_format(first: Iterable[Any], columns: Mapping[str, str], are_questions: bool = False) -> Format:
    """The format of a file by the first of its rows that is in any.

    Args:
        first: the first rows of the file.
        columns: name that a format knows → name in the file.
        are_questions: whether the last answer may be missing.

    Returns:
        The format; Alpaca if no row matches, because its errors name what is missing.
    """
    for row in (renamed(value, columns) for value in first if isinstance(value, dict)):
        for kind in FORMATS:
            if kind.is_of(kind.answered(row) if are_questions else row):
                return kind
    return ALPACA


def renamed(value: Any, columns: Mapping[str, str] | None) -> Any:
    """Return a row with its columns renamed to the names that a format knows."""
    if not isinstance(value, dict) or not columns:
        return value
    rest = {key: inner for key, inner in value.items() if key not in columns.values()}
    return rest | {known: value[own] for known, own in columns.items() if own in value}


def _in_file_s_words(problem: str, kind: Format, row: Any) -> str:
    """Return a problem with the names that a row's format has for its columns, and what it has misspelt of them."""
    for known, own in (kind.columns or {}).items():
        problem = problem.replace(f"'{known}'", f"'{own}'")
    named = NAMED_FIRST.match(problem)
    if not named or named[1] in row:
        return problem
    misspelt = nearest(named[1], map(str, row), MISSPELT)
    return f"{problem}, but there is {misspelt!r}" if misspelt else problem


def _filled(message: Message, fill: Filler) -> Message:
    filled: Message = {**message, "content": fill(message["content"])}
    if "tool_calls" in message:
        filled["tool_calls"] = fill.all_texts(message["tool_calls"])
    return filled
