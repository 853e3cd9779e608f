"""The Alpaca format: instruction, input, output, system, history."""

from __future__ import annotations

from typing import Any

from loratune.data.formats.conversation import Message, has_half_a_pair, kind_of

KEYS = ("instruction", "input", "output", "system", "history")


def problems(value: dict[str, Any]) -> list[str]:
    """Return the reasons why a row cannot be trained on."""
    found = [_text_problem(value, key, required=key == "output") for key in KEYS if key != "history"]
    asked = [value.get("instruction"), value.get("input")]
    if all(text is None or (isinstance(text, str) and not text.strip()) for text in asked):
        found.append("'instruction' is missing or empty")
    found.append(_history_problem(value.get("history")))
    return [problem for problem in found if problem]


def messages(value: dict[str, Any]) -> list[Message]:
    """Return the turns of a row; instruction and input are joined by a newline."""
    turns: list[Message] = []
    if value.get("system"):
        turns.append({"role": "system", "content": value["system"]})
    question = "\n".join(text for text in (value.get("instruction"), value.get("input")) if text)
    for asked, answered in [*(value.get("history") or []), (question, value["output"])]:
        turns.append({"role": "user", "content": asked})
        turns.append({"role": "assistant", "content": answered})
    return turns


def unread(value: dict[str, Any]) -> dict[str, Any]:
    """Return the columns that this format does not use."""
    return {key: inner for key, inner in value.items() if key not in KEYS}


def _text_problem(value: dict[str, Any], key: str, required: bool) -> str:
    text = value.get(key)
    if text is None:
        return f"{key!r} is {'null' if key in value else 'missing'}" if required else ""
    if not isinstance(text, str):
        return f"{key!r} is {kind_of(text)}, not a text"
    if has_half_a_pair(text):
        return f"{key!r} holds an unpaired UTF-16 surrogate"
    return ""


def _history_problem(history: Any) -> str:
    if history is None:
        return ""
    is_pairs = isinstance(history, list) and all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) and turn[0].strip()
        for turn in history
    )
    if not is_pairs:
        return "'history' is not a list of [question, answer] pairs of texts"
    has_half = any(has_half_a_pair(text) for turn in history for text in turn)
    return "'history' holds an unpaired UTF-16 surrogate" if has_half else ""
