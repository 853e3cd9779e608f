"""A conversation, which every format of rows becomes, and what holds for the texts in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict


class _Said(TypedDict):
    role: Literal["system", "user", "assistant", "tool"]
    content: str


class Message(_Said, total=False):
    """One turn, in the form that chat templates take."""

    tool_calls: list[dict[str, Any]]
    """Of an assistant: {"type": "function", "function": {"name": …, "arguments": an object}}."""
    name: str
    """Of a tool: which one it is."""


@dataclass(frozen=True)
class Conversation:
    """A system message if there is one, then questions and answers in turn; ends with an answer.

    Between an answer that calls tools and the next answer stand the messages of these tools.
    """

    messages: tuple[Message, ...]
    untrained: frozenset[int] = frozenset()
    """Answers, by their number among the messages, that the row itself leaves out of training."""
    tools: tuple[dict[str, Any], ...] = ()
    """What the assistant may call: a JSON schema each."""

    def trained_answers(self, train_on: str) -> list[int]:
        """Numbers, among the messages, of the answers to be trained: `all`, or the `last`."""
        answers = [
            place
            for place, message in enumerate(self.messages)
            if message["role"] == "assistant" and place not in self.untrained
        ]
        return answers if train_on == "all" else answers[-1:]


def written_out(text: str, calls: Sequence[dict[str, Any]]) -> str:
    """An answer as one text, to be compared: what it says, then a line of JSON for each call, whose keys are sorted."""
    functions = (call["function"] for call in calls)
    lines = (
        json.dumps({"name": one["name"], "arguments": one["arguments"]}, ensure_ascii=False, sort_keys=True)
        for one in functions
    )
    return "\n".join(part for part in (text, *lines) if part)


def kind_of(value: Any) -> str:
    """What a JSON value is, for people."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")


def has_half_a_pair(text: str) -> bool:
    """Whether a text holds half of a UTF-16 pair, which no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects of a JSON value stand in each other more than so many levels deep."""
    layer = [value]
    for _ in range(levels):
        nested = [one.values() if isinstance(one, dict) else one for one in layer if isinstance(one, dict | list)]
        if not nested:
            return False
        layer = [inner for one in nested for inner in one]
    return any(isinstance(one, dict | list) for one in layer)


def texts_in(value: Any) -> Iterator[str]:
    """All texts in a JSON value; the keys of its objects are left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_in(inner)


def keys_in(value: Any) -> Iterator[str]:
    """The keys of all objects in a JSON value."""
    if isinstance(value, dict):
        yield from value
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from keys_in(inner)
