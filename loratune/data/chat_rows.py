"""Rows that hold whole conversations: OpenAI's `messages` and ShareGPT's `conversations`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loratune.data.conversation import Message, has_half_a_pair, kind_of

Turn = tuple[Any, Any]
"""Role and content, as the row has them."""
ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = ROLES | {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
TOOL_ROLES = ("tool", "function", "function_call", "observation")
MESSAGES_NEED = "each row needs 'messages': a list of {role, content}, user and assistant in turn, an answer last"
SHAREGPT_NEEDS = "each row needs 'conversations': a list of {from, value}, human and gpt in turn, an answer last"


def problems_of_messages(value: dict[str, Any]) -> list[str]:
    """What keeps a row of messages from being trained on."""
    found = _problems(value, "messages", _turns_of_messages, ROLES)
    if found:
        return found
    weights = [turn.get("weight") for turn in value["messages"]]
    found = [
        f"message {place}: 'weight' is neither 0 nor 1" for place, w in enumerate(weights, 1) if w not in (None, 0, 1)
    ]
    if any(turn.get("tool_calls") for turn in value["messages"]):
        found.append("calls of tools are not trained yet")
    if len(untrained_messages(value)) == sum(turn["role"] == "assistant" for turn in value["messages"]):
        found.append("every answer has weight 0")
    return found


def problems_of_sharegpt(value: dict[str, Any]) -> list[str]:
    """What keeps a ShareGPT row from being trained on."""
    return _problems(value, "conversations", _turns_of_sharegpt, SHAREGPT_ROLES)


def from_messages(value: dict[str, Any]) -> list[Message]:
    """The turns of a row of messages."""
    return [_message(ROLES[role], content) for role, content in _turns_of_messages(value)]


def from_sharegpt(value: dict[str, Any]) -> list[Message]:
    """The turns of a ShareGPT row."""
    return [_message(SHAREGPT_ROLES[role], content) for role, content in _turns_of_sharegpt(value)]


def untrained_messages(value: dict[str, Any]) -> frozenset[int]:
    """Numbers of the answers with weight 0, which OpenAI's format leaves out of training."""
    return frozenset(
        place for place, turn in enumerate(value["messages"]) if turn["role"] == "assistant" and turn.get("weight") == 0
    )


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}  # type: ignore[typeddict-item]


def _turns_of_messages(value: dict[str, Any]) -> list[Turn]:
    return [(turn["role"], _joined(turn.get("content"))) for turn in value["messages"]]


def _turns_of_sharegpt(value: dict[str, Any]) -> list[Turn]:
    turns = [(turn["from"], turn.get("value")) for turn in value["conversations"]]
    return [("system", value["system"]), *turns] if value.get("system") else turns


def _joined(content: Any) -> Any:
    """A content that is a list of text parts as one text; anything else as it is."""
    is_parts = isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    )
    return "".join(part["text"] for part in content) if is_parts else content


def _problems(
    value: dict[str, Any], key: str, turns_of: Callable[[dict[str, Any]], list[Turn]], roles: dict[str, str]
) -> list[str]:
    given = value.get(key)
    role_key = "role" if key == "messages" else "from"
    if not isinstance(given, list) or not given:
        return [f"{key!r} is {'an empty list' if given == [] else kind_of(given)}, not a list of turns"]
    odd = [place for place, turn in enumerate(given, 1) if not isinstance(turn, dict) or role_key not in turn]
    if odd:
        return [f"message {odd[0]} is not an object with {role_key!r}"]
    turns = turns_of(value)
    found = [problem for place, turn in enumerate(turns, 1) if (problem := _turn_problem(turn, roles, place))]
    return found or _order_problems([roles[role] for role, _ in turns])


def _turn_problem(turn: Turn, roles: dict[str, str], place: int) -> str:
    role, content = turn
    if role in TOOL_ROLES:
        return f"message {place}: turns of tools ({role}) are not trained yet"
    if not isinstance(role, str) or role not in roles:
        return f"message {place}: the role {role!r} is none of {', '.join(roles)}"
    if not isinstance(content, str):
        return f"message {place}: its text is {kind_of(content)}"
    if has_half_a_pair(content):
        return f"message {place}: holds half of a UTF-16 pair, which is no character"
    return f"message {place}: its text is empty" if not content.strip() else ""


def _order_problems(roles: list[str]) -> list[str]:
    spoken = roles[1:] if roles[0] == "system" else roles
    for place, role in enumerate(spoken):
        expected = "assistant" if place % 2 else "user"
        if role != expected:
            return [f"message {place + 1 + len(roles) - len(spoken)} is of {role} where {expected} is expected"]
    return [] if spoken and spoken[-1] == "assistant" else ["it does not end with an answer"]
