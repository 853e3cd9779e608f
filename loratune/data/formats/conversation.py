"""The common form of a conversation, and checks of its texts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

OPENING, CLOSING = "<think>", "</think>"
"""Tags around the reasoning of an answer, in rows and in most templates."""
BLOCK = re.compile(
    rf"\s*(?:{OPENING}[\r\n]*(.*?)[\r\n]*{CLOSING}|((?:(?!{OPENING}).)*?)[\r\n]+{CLOSING}(?=[\r\n]))[\r\n]*",
    re.DOTALL,
)
"""Matches reasoning at the start of an answer. It may lack its opening tag, which some models have in their prompts."""
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Keys under which messages hold reasoning; the first is the usual one."""


class _Said(TypedDict):
    role: Literal["system", "user", "assistant", "tool"]
    content: str


class Message(_Said, total=False):
    """One turn, in the form that chat templates take."""

    tool_calls: list[dict[str, Any]]
    """Of an assistant message: {"type": "function", "function": {"name": …, "arguments": an object}} each."""
    name: str
    """Of a tool message: the tool's name."""


def with_reasoning(answer: str, reasoning: str) -> str:
    """Return an answer's text with its reasoning as a block before it; the text alone if the reasoning is empty."""
    if not reasoning:
        return answer
    thought = reasoning.strip("\n")
    return f"{OPENING}\n{thought}\n{CLOSING}\n\n{answer}"


def reasoning_apart(answer: str) -> tuple[str, str]:
    """Return the reasoning of an answer that begins with a block, and the text after it; inverse of `with_reasoning`.

    The reasoning is empty if there is none.
    """
    block = BLOCK.match(answer) if CLOSING in answer else None
    return (block[1] or block[2] or "", answer[block.end() :]) if block else ("", answer)


@dataclass(frozen=True)
class Conversation:
    """An optional system message, then alternating questions and answers; the last message is an answer.

    The results of tool calls follow the answer that makes the calls.
    """

    messages: tuple[Message, ...]
    untrained: frozenset[int] = frozenset()
    """Message indices of the answers that the row excludes from training."""
    tools: tuple[dict[str, Any], ...] = ()
    """JSON schemas of the tools that the assistant may call."""

    def trained_answers(self, train_on: str) -> list[int]:
        """Return the message indices of the answers to train: `all`, or the `last`."""
        answers = [
            place
            for place, message in enumerate(self.messages)
            if message["role"] == "assistant" and place not in self.untrained
        ]
        return answers if train_on == "all" else answers[-1:]


def written_out(text: str, calls: Sequence[dict[str, Any]]) -> str:
    """Return an answer as one text for comparison: its content, then one line of JSON with sorted keys per call."""
    functions = (call["function"] for call in calls)
    lines = (
        json.dumps({"name": one["name"], "arguments": one["arguments"]}, ensure_ascii=False, sort_keys=True)
        for one in functions
    )
    return "\n".join(part for part in (text, *lines) if part)


def kind_of(value: Any) -> str:
    """Return the type of a JSON value in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")


def has_half_a_pair(text: str) -> bool:
    """Return whether a text has an unpaired UTF-16 surrogate, which no encoding can represent."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def is_deeper(value: Any, levels: int) -> bool:
    """Return whether lists and objects of a JSON value are nested more than `levels` deep."""
    layer = [value]
    for _ in range(levels):
        nested = [one.values() if isinstance(one, dict) else one for one in layer if isinstance(one, dict | list)]
        if not nested:
            return False
        layer = [inner for one in nested for inner in one]
    return any(isinstance(one, dict | list) for one in layer)


def texts_in(value: Any) -> Iterator[str]:
    """Yield all strings in a JSON value, except the keys of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts_in(inner)


def keys_in(value: Any) -> Iterator[str]:
    """Yield the keys of all objects in a JSON value."""
    if isinstance(value, dict):
        yield from value
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from keys_in(inner)
