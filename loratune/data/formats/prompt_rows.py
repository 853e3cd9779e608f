"""TRL's conversational prompt and completion: two lists of turns, of which only answers in the second are trained."""

from __future__ import annotations

import re
from typing import Any

from loratune.data.formats import asked_rows
from loratune.data.formats.chat_rows import MESSAGES, TRAINING_MARKS, ChatRows, TurnStyle
from loratune.data.formats.conversation import Message, kind_of

PROMPT, COMPLETION = ChatRows("prompt", MESSAGES.usual), ChatRows("completion", MESSAGES.usual)
LISTS = (PROMPT.key, COMPLETION.key)
NEEDS = f"each row needs {PROMPT.key!r} and {COMPLETION.key!r}: lists of {{role, content}}, an answer last"
NUMBER = re.compile(r"^message (\d+)")


def has_lists(row: dict[str, Any]) -> bool:
    """Return whether prompt or completion is a list of turns, not a text."""
    return any(isinstance(row.get(key), list) for key in LISTS)


def problems(value: dict[str, Any]) -> list[str]:
    """Return the reasons why a row cannot be trained on. Turns are numbered within their list."""
    given = {key: value.get(key) for key in LISTS}
    found = [
        f"{key!r} is {'an empty list' if turns == [] else kind_of(turns)}, not a list of turns"
        for key, turns in given.items()
        if not isinstance(turns, list) or not turns
    ]
    if found:
        return found
    before = len(value[PROMPT.key])
    found = MESSAGES.problems(_joined(value))
    if not found and messages(value)[-len(value[COMPLETION.key])]["role"] != "assistant":
        found = [f"message {before + 1} is no answer, with which a completion begins"]
    return [NUMBER.sub(lambda match: _place(int(match[1]), before), one) for one in found]


def messages(value: dict[str, Any]) -> list[Message]:
    """Return the turns of a row that has no problems."""
    return MESSAGES.messages(_joined(value))


def untrained(value: dict[str, Any]) -> frozenset[int]:
    """Return the message indices of the prompt's answers, and of the answers that the row excludes from training."""
    return MESSAGES.untrained(_joined(value))


def unread(value: dict[str, Any]) -> dict[str, Any]:
    """Return the columns, and keys of turns, that are not used, with their values."""
    rest = {key: inner for key, inner in value.items() if key not in LISTS}
    return {
        name: inner
        for rows in (PROMPT, COMPLETION)
        for name, inner in rows.unread({**rest, rows.key: value[rows.key]}).items()
    }


def answered(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose completion may be missing, with one that says nothing."""
    turns = row.get(PROMPT.key)
    if not isinstance(turns, list):
        return row
    style = PROMPT.style_of(turns)
    completion = row.get(COMPLETION.key) or [asked_rows.blank(style)]
    is_list = isinstance(completion, list)
    return row | {COMPLETION.key: asked_rows.answered(completion, style) if is_list else completion}


def _joined(value: dict[str, Any]) -> dict[str, Any]:
    """Return a row as one conversation whose prompt answers are marked as untrained."""
    style = MESSAGES.style_of([*value[PROMPT.key], *value[COMPLETION.key]])
    given = (
        mark for turn in value[COMPLETION.key] if isinstance(turn, dict) for mark in TRAINING_MARKS if mark in turn
    )
    mark = next(given, TRAINING_MARKS[0])
    prompt = [{**turn, mark: 0} if _is_answer(turn, style) else turn for turn in value[PROMPT.key]]
    rest = {key: inner for key, inner in value.items() if key not in LISTS}
    return rest | {MESSAGES.key: [*prompt, *value[COMPLETION.key]]}


def _is_answer(turn: Any, style: TurnStyle) -> bool:
    speaker = turn.get(style.role) if isinstance(turn, dict) else None
    return isinstance(speaker, str) and style.roles.get(speaker) == "assistant"


def _place(number: int, before: int) -> str:
    """Return the list and number of the turn that has this number in the whole conversation."""
    is_prompt = number <= before
    return f"message {number if is_prompt else number - before} of {(PROMPT if is_prompt else COMPLETION).key!r}"
