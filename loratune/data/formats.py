"""Alpaca rows → conversations; every row is checked, and all problems are told at once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from loratune.data.sources import Row
from loratune.errors import Exit, LoratuneError, bullet_list

PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")
# The two placeholders that published identity data uses; others may be meant literally.
MUST_BE_FILLED = ("name", "author")
ROW_KEYS = ("instruction", "input", "output", "system", "history")


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


def read_alpaca(rows: list[Row], placeholders: dict[str, str]) -> list[Conversation]:
    """Turn Alpaca rows (instruction, input, output, system, history) into conversations.

    Instruction and input are joined by a newline. `{{name}}` in any text becomes the placeholder's value.

    Raises:
        LoratuneError: with the places of all rows that do not fit.
    """
    fill = _Filler(placeholders)
    conversations, problems = [], []
    for row in rows:
        found = _problems(row.value)
        if found:
            problems.append(f"{row.place}: {'; '.join(found)}")
        else:
            conversations.append(Conversation(tuple(_messages(row.value, fill)), row.place))
    if problems:
        raise LoratuneError(
            f"{len(problems)} of {len(rows)} rows cannot be trained on:\n{bullet_list(problems, limit=5)}\n"
            "each row needs the texts 'instruction' and 'output'; mend or remove these rows",
            Exit.DATA,
        )
    if fill.missing:
        flags = " ".join(f"--data.placeholders {name}=…" for name in sorted(fill.missing))
        raise LoratuneError(
            f"rows hold {', '.join('{{' + name + '}}' for name in sorted(fill.missing))}; "
            f"give values in data.placeholders, or as {flags}",
            Exit.DATA,
        )
    return conversations


class _Filler:
    """Fills placeholders, whatever their case, and remembers those that had to be filled but were not given."""

    def __init__(self, placeholders: dict[str, str]) -> None:
        self.values = {name.lower(): value for name, value in placeholders.items()}
        self.missing: set[str] = set()

    def __call__(self, text: str) -> str:
        return PLACEHOLDER.sub(self._value, text)

    def _value(self, match: re.Match[str]) -> str:
        name = match[1].lower()
        if name not in self.values and name in MUST_BE_FILLED:
            self.missing.add(name)
        return self.values.get(name, match[0])


def _problems(value: Any) -> list[str]:
    if not isinstance(value, dict):
        return [f"is {_kind(value)}, not an object with 'instruction' and 'output'"]
    problems = [_text_problem(value, key, required=key == "output") for key in ROW_KEYS if key != "history"]
    asked = [value.get("instruction"), value.get("input")]
    if all(text is None or (isinstance(text, str) and not text.strip()) for text in asked):
        problems.append("'instruction' is missing or empty")
    problems.append(_history_problem(value.get("history")))
    return [problem for problem in problems if problem]


def _text_problem(value: dict[str, Any], key: str, required: bool) -> str:
    text = value.get(key)
    if text is None:
        return f"{key!r} is {'null' if key in value else 'missing'}" if required else ""
    if not isinstance(text, str):
        return f"{key!r} is {_kind(text)}, not a text"
    if _has_half_a_pair(text):
        return f"{key!r} holds half of a UTF-16 pair, which is no character"
    return f"{key!r} is empty" if required and not text.strip() else ""


def _history_problem(history: Any) -> str:
    if history is None:
        return ""
    is_pairs = isinstance(history, list) and all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) and text.strip() for text in turn)
        for turn in history
    )
    if not is_pairs:
        return "'history' is not a list of [question, answer] pairs of texts"
    has_half = any(_has_half_a_pair(text) for turn in history for text in turn)
    return "'history' holds half of a UTF-16 pair, which is no character" if has_half else ""


def _has_half_a_pair(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "a number")


def _messages(value: dict[str, Any], fill: _Filler) -> list[Message]:
    messages: list[Message] = []
    if value.get("system"):
        messages.append({"role": "system", "content": fill(value["system"])})
    question = "\n".join(text for text in (value.get("instruction"), value.get("input")) if text)
    for asked, answered in [*(value.get("history") or []), (question, value["output"])]:
        messages.append({"role": "user", "content": fill(asked)})
        messages.append({"role": "assistant", "content": fill(answered)})
    return messages
