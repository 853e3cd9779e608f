"""A conversation, which every format of rows becomes, and what holds for the texts in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypedDict


class Message(TypedDict):
    """One turn, in the form that chat templates take."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Conversation:
    """Alternating user and assistant messages, a system message first if there is one; ends with an answer."""

    messages: tuple[Message, ...]
    place: str
    """Where the row stands, for messages."""
    untrained: frozenset[int] = frozenset()
    """Answers, by their number among the messages, that the row itself leaves out of training."""


def kind_of(value: Any) -> str:
    """What a JSON value is, for people."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")


def has_half_a_pair(text: str) -> bool:
    """Whether a text holds half of a UTF-16 pair, which no encoding can write."""
    return any("\ud800" <= character <= "\udfff" for character in text)
