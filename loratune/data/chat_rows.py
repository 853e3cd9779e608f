"""Whole conversations, OpenAI's `messages` and ShareGPT's `conversations`, both with calls of tools.

Rows of `sft` and of `infer`, and the requests of `serve`, are read here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import groupby
from typing import Any

from loratune.data.conversation import Message, has_half_a_pair, kind_of

ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "function": "tool",
}  # fmt: skip
SHAREGPT_ROLES = ROLES | {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "function_call": "assistant",
    "observation": "tool",
}  # fmt: skip
TRAINING_MARKS = ("loss", "loss_scale", "train", "training", "weight")
"""Keys by which a turn says whether it is trained: OpenAI's weight, and those of other programs."""
MESSAGE_KEYS = frozenset(
    {"role", "content", "tool_calls", "function_call", "tool_call_id", "name", "reasoning_content", *TRAINING_MARKS}
)
SHAREGPT_KEYS = frozenset({"from", "value", *TRAINING_MARKS})
MESSAGES_NEED = "each row needs 'messages': a list of {role, content}, an answer last"
SHAREGPT_NEEDS = "each row needs 'conversations': a list of {from, value}, an answer last"
HALF_A_PAIR = "holds half of a UTF-16 pair, which is no character"


def problems_of_messages(value: dict[str, Any]) -> list[str]:
    """What keeps a row of messages from being trained on."""
    found = _problems(value, "messages", "role", read_message)
    return found or _mark_problems(value["messages"], "role", ROLES)


def problems_of_sharegpt(value: dict[str, Any]) -> list[str]:
    """What keeps a ShareGPT row from being trained on."""
    found = _problems(value, "conversations", "from", _read_sharegpt)
    return found or _mark_problems(value["conversations"], "from", SHAREGPT_ROLES)


def from_messages(value: dict[str, Any]) -> list[Message]:
    """The turns of a row of messages that has no problems."""
    return [read for turn in in_order_of_calls(value["messages"]) if not isinstance(read := read_message(turn), str)]


def from_sharegpt(value: dict[str, Any]) -> list[Message]:
    """The turns of a ShareGPT row that has no problems."""
    turns = [*_system_beside(value), *value["conversations"]]
    return [read for turn in turns if not isinstance(read := _read_sharegpt(turn), str)]


def untrained_messages(value: dict[str, Any]) -> frozenset[int]:
    """Numbers, among the messages, of the answers that the row leaves out of training."""
    return _untrained(value["messages"], "role", ROLES)


def untrained_sharegpt(value: dict[str, Any]) -> frozenset[int]:
    """The same of a ShareGPT row; a system prompt beside the turns is its first message."""
    beside = len(_system_beside(value))
    return frozenset(place + beside for place in _untrained(value["conversations"], "from", SHAREGPT_ROLES))


def _untrained(turns: list[dict[str, Any]], role_key: str, roles: dict[str, str]) -> frozenset[int]:
    return frozenset(
        place
        for place, turn in enumerate(turns)
        if roles[turn[role_key]] == "assistant" and any(turn.get(mark) == 0 for mark in TRAINING_MARKS)
    )


def _mark_problems(turns: list[dict[str, Any]], role_key: str, roles: dict[str, str]) -> list[str]:
    """Marks of single turns that cannot be honoured: a share of the loss, or the training of what is no answer."""
    found = []
    for place, turn in enumerate(turns, 1):
        given = {mark: turn[mark] for mark in TRAINING_MARKS if turn.get(mark) is not None}
        found += [
            f"message {place}: {mark!r} is neither 0 nor 1" for mark, value in given.items() if value not in (0, 1)
        ]
        wanted = [mark for mark, value in given.items() if value == 1]
        if wanted and roles[turn[role_key]] in ("user", "tool"):
            found.append(f"message {place}: {wanted[0]!r} asks to train it, and only answers are trained")
    answers = sum(roles[turn[role_key]] == "assistant" for turn in turns)
    if not found and len(_untrained(turns, role_key, roles)) == answers:
        marks = sorted({mark for turn in turns for mark in TRAINING_MARKS if turn.get(mark) == 0})
        found.append(f"every answer is left out of training by {', '.join(map(repr, marks))}")
    return found


def tools_of(value: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """What the assistant of a row may call, each as OpenAI's {"type": "function", "function": {…}}."""
    tools = read_tools(_given_tools(value))
    return () if isinstance(tools, str) else tuple(tools)


def _problems(
    value: dict[str, Any], key: str, role_key: str, read: Callable[[dict[str, Any]], Message | str]
) -> list[str]:
    given = value.get(key)
    if not isinstance(given, list) or not given:
        return [f"{key!r} is {'an empty list' if given == [] else kind_of(given)}, not a list of turns"]
    odd = [place for place, turn in enumerate(given, 1) if not isinstance(turn, dict) or role_key not in turn]
    if odd:
        return [f"message {odd[0]} is not an object with {role_key!r}"]
    beside = _system_beside(value) if key == "conversations" else []
    messages = [read(turn) for turn in [*beside, *given]]
    first = 1 - len(beside)
    found = [f"message {place}: {one}" for place, one in enumerate(messages, first) if isinstance(one, str)]
    tools = read_tools(_given_tools(value))
    if isinstance(tools, str):
        found.append(tools)
    return found or _order_problems([one for one in messages if not isinstance(one, str)], first)


def _system_beside(value: dict[str, Any]) -> list[dict[str, Any]]:
    """ShareGPT's system prompt where it stands beside the conversation, as a turn."""
    return [{"from": "system", "value": value["system"]}] if value.get("system") else []


def _order_problems(messages: list[Message], first: int) -> list[str]:
    """Any order that the model's template renders is one to train on, but an answer needs something before it."""
    if messages[0]["role"] == "assistant":
        return [f"message {first} is an answer, and nothing stands before it"]
    return [] if messages[-1]["role"] == "assistant" else ["it does not end with an answer"]


def _given_tools(value: dict[str, Any]) -> Any:
    """The tools of a row; `functions` is the older name."""
    return value["tools"] if value.get("tools") is not None else value.get("functions")


def in_order_of_calls(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI's turns, results of tools in the order of their calls: most templates do not write their ids."""
    places: dict[str, int] = {}
    ordered: list[dict[str, Any]] = []
    for role, group in groupby(turns, key=lambda turn: turn["role"]):
        run = list(group)
        ids = [turn.get("tool_call_id") for turn in run]
        if role == "tool" and all(isinstance(one, str) and one in places for one in ids):
            run.sort(key=lambda turn: places[turn["tool_call_id"]])
        calls = run[-1].get("tool_calls")
        listed = calls if isinstance(calls, list) else []
        places = {
            call["id"]: place
            for place, call in enumerate(listed)
            if isinstance(call, dict) and isinstance(call.get("id"), str)
        }
        ordered += run
    return ordered


def read_message(turn: dict[str, Any], may_be_blank: bool = False) -> Message | str:
    """One of OpenAI's turns as the template takes it, or what is wrong with it.

    Args:
        turn: with a role.
        may_be_blank: whether a question without words is one.
    """
    given, content = turn["role"], _joined(turn.get("content"))
    if not isinstance(given, str) or given not in ROLES:
        return f"the role {given!r} is none of {', '.join(ROLES)}"
    role, reasoning = ROLES[given], turn.get("reasoning_content")
    calls = _read_calls(turn.get("tool_calls") or _older_call(turn))
    if isinstance(calls, str):
        return calls
    if role != "assistant" and (calls or reasoning):
        return f"{'calls of tools stand' if calls else 'reasoning stands'} in a message of {role}"
    if content is None and calls:
        content = ""
    if not isinstance(reasoning, str | None):
        return f"its 'reasoning_content' is {kind_of(reasoning)}"
    if reasoning and isinstance(content, str):
        thought = reasoning.strip("\n")
        content = f"<think>\n{thought}\n</think>\n\n{content}"
    message = _checked(role, content, calls, may_be_blank)
    name = turn.get("name")
    if role == "tool" and isinstance(name, str) and not isinstance(message, str):
        return HALF_A_PAIR if has_half_a_pair(name) else {**message, "name": name}
    return message


def _older_call(turn: dict[str, Any]) -> Any:
    """OpenAI's `function_call`, the older form of one call, as a list of calls."""
    call = turn.get("function_call")
    return None if call is None else [call]


def _read_sharegpt(turn: dict[str, Any]) -> Message | str:
    role, content = turn["from"], turn.get("value")
    if not isinstance(role, str) or role not in SHAREGPT_ROLES:
        return f"the role {role!r} is none of {', '.join(SHAREGPT_ROLES)}"
    if role != "function_call":
        return _checked(SHAREGPT_ROLES[role], content, [])
    called = _parsed(content)
    calls = _read_calls([called] if isinstance(called, dict) else called)
    if isinstance(calls, str):
        return calls
    return _checked("assistant", "", calls) if calls else "its call is neither a JSON object nor a list of some"


def _checked(role: str, content: Any, calls: list[dict[str, Any]], may_be_blank: bool = False) -> Message | str:
    if isinstance(content, list):
        kinds = [part.get("type") for part in content if isinstance(part, dict) and part.get("type") != "text"]
        return f"it has a part of type {kinds[0]!r}, and only texts are trained here" if kinds else "its text is a list"
    if not isinstance(content, str):
        return f"its text is {kind_of(content)}"
    if has_half_a_pair(content):
        return HALF_A_PAIR
    if role == "user" and not content.strip() and not may_be_blank:
        return "its text is empty"
    message: Message = {"role": role, "content": content}  # type: ignore[typeddict-item]
    if calls:
        message["tool_calls"] = calls
    return message


def _joined(content: Any) -> Any:
    """A content that is a list of text parts as one text; anything else as it is."""
    is_parts = isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    )
    return "".join(part["text"] for part in content) if is_parts else content


def _read_calls(given: Any) -> list[dict[str, Any]] | str:
    """Calls of tools with their arguments as objects, which most templates want, or what is wrong with them."""
    given = _without_nulls(given)
    if given is None:
        return []
    if not isinstance(given, list):
        return f"its calls of tools are {kind_of(given)}, not a list"
    calls = []
    for place, call in enumerate(given, 1):
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            return f"call {place} is no object with the 'name' of a tool"
        arguments = _parsed(function.get("arguments"))
        if not isinstance(arguments, dict):
            return f"call {place} ({name}): 'arguments' are neither an object nor the JSON text of one"
        calls.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    return HALF_A_PAIR if has_half_a_pair(json.dumps(calls, ensure_ascii=False)) else calls


def read_tools(given: Any) -> list[dict[str, Any]] | str:
    """Descriptions of tools, each as OpenAI's {"type": "function", "function": {…}}, or what is wrong with them."""
    tools = _parsed(_without_nulls(given)) if given != "" else None
    if tools is None and given in (None, "", "null"):
        return []
    if not isinstance(tools, list):
        return "'tools' is neither a list nor the JSON text of one"
    found = []
    for place, tool in enumerate(tools, 1):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return f"entry {place} of 'tools' is no object with a 'name'"
        found.append(tool if "function" in tool else {"type": "function", "function": tool})
    half = has_half_a_pair(json.dumps(found, ensure_ascii=False))
    return f"'tools' {HALF_A_PAIR}" if half else found


def _without_nulls(value: Any) -> Any:
    """A value without the null keys that Arrow gives every object of a column; nulls in lists stay, as in TRL.

    A null inside a JSON text was written by somebody, and stays.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _parsed(value: Any) -> Any:
    """A JSON text as what it stands for, None if it is no JSON; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None
