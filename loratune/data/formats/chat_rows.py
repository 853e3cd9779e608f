"""The chat formats: OpenAI's `messages` and ShareGPT's `conversations`, both with tool calls.

They serve the rows of `sft` and `infer` and the requests of `serve`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from loratune.data.formats.conversation import REASONING_KEYS, Message, has_half_a_pair, kind_of, with_reasoning
from loratune.data.formats.row_tools import HALF_A_PAIR, given_tools, parsed, read_calls, read_tools

ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "function": "tool",
}  # fmt: skip
SHAREGPT_ROLES = ROLES | {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "function_call": "assistant",
    "observation": "tool",
}  # fmt: skip
TRAINING_MARKS = ("loss", "loss_scale", "train", "training", "weight")
"""Keys that mark a turn as trained or not: OpenAI's weight, and those of other tools."""


@dataclass(frozen=True)
class TurnStyle:
    """The keys and role names of a conversation's turns."""

    role: str
    """Key of the role."""
    text: str
    """Key of the text."""
    roles: Mapping[str, str]
    """Name of a role in the file → role."""
    keys: frozenset[str]
    """All keys that are read from a turn."""


OPENAI = TurnStyle(
    "role",
    "content",
    ROLES,
    frozenset(
        {"role", "content", "tool_calls", "function_call", "tool_call_id", "name", *REASONING_KEYS, *TRAINING_MARKS}
    ),
)
SHAREGPT = TurnStyle("from", "value", SHAREGPT_ROLES, frozenset({"from", "value", *TRAINING_MARKS}))


@dataclass(frozen=True)
class ChatRows:
    """Rows with a list of turns. The keys of the turns decide their style, whatever the list is called."""

    key: str
    """Key of the list."""
    usual: TurnStyle
    """The style that such a list usually has."""

    @property
    def needs(self) -> str:
        """What each row needs, for error messages."""
        return f"each row needs {self.key!r}: a list of {{{self.usual.role}, {self.usual.text}}}, an answer last"

    def style_of(self, turns: list[Any]) -> TurnStyle:
        """Return the style of a row's turns: the other one only if all turns have it."""
        other = self._other
        is_other = bool(turns) and all(isinstance(turn, dict) and turn.get(other.role) is not None for turn in turns)
        is_usual = all(isinstance(turn, dict) and turn.get(self.usual.role) is not None for turn in turns)
        return other if is_other and not is_usual else self.usual

    def problems(self, value: dict[str, Any]) -> list[str]:
        """Return the reasons why a row cannot be trained on."""
        given = value.get(self.key)
        if not isinstance(given, list) or not given:
            return [f"{self.key!r} is {'an empty list' if given == [] else kind_of(given)}, not a list of turns"]
        style = self.style_of(given)
        found = self._form_problems(given, style)
        if found:
            return found
        beside = self._system_beside(value, style)
        messages = [_read(turn, style) for turn in [*beside, *given]]
        first = 1 - len(beside)
        found = [f"message {place}: {one}" for place, one in enumerate(messages, first) if isinstance(one, str)]
        tools = read_tools(given_tools(value))
        found += [tools] if isinstance(tools, str) else []
        return (
            found
            or _order_problems([one for one in messages if not isinstance(one, str)], first)
            or _mark_problems(given, style)
        )

    def messages(self, value: dict[str, Any]) -> list[Message]:
        """Return the turns of a row that has no problems."""
        style = self.style_of(value[self.key])
        turns = [*self._system_beside(value, style), *value[self.key]]
        turns = in_order_of_calls(turns) if style is OPENAI else turns
        return [read for turn in turns if not isinstance(read := _read(turn, style), str)]

    def untrained(self, value: dict[str, Any]) -> frozenset[int]:
        """Return the message indices of the answers that the row excludes from training."""
        style = self.style_of(value[self.key])
        beside = len(self._system_beside(value, style))  # it is the first message
        return frozenset(place + beside for place in _untrained(value[self.key], style))

    def unread(self, value: dict[str, Any]) -> dict[str, Any]:
        """Return the columns, and keys of turns, that are not used, with their values."""
        style = self.style_of(value[self.key])
        read = {self.key, "tools", "functions"} | ({"system"} if self._takes_system(style) else set())
        columns = {key: inner for key, inner in value.items() if key not in read}
        for turn in value[self.key]:
            for key in turn.keys() - style.keys:
                if turn[key] is not None:
                    columns.setdefault(f"{self.key}[].{key}", []).append(turn[key])
        return columns

    @property
    def _other(self) -> TurnStyle:
        return SHAREGPT if self.usual is OPENAI else OPENAI

    def _takes_system(self, style: TurnStyle) -> bool:
        """Return whether the row's own `system` column is the system prompt, as in ShareGPT."""
        return SHAREGPT in (self.usual, style)

    def _system_beside(self, value: dict[str, Any], style: TurnStyle) -> list[dict[str, Any]]:
        """Return the row's `system` column as a turn."""
        takes = self._takes_system(style) and value.get("system")
        return [{style.role: "system", style.text: value["system"]}] if takes else []

    def _form_problems(self, turns: list[Any], style: TurnStyle) -> list[str]:
        """Return problems of turns that are not objects, or that mix the two styles."""
        other = OPENAI if style is SHAREGPT else SHAREGPT
        for place, turn in enumerate(turns, 1):
            if not isinstance(turn, dict):
                return [f"message {place} is not an object with {style.role!r}"]
            has_other = turn.get(style.role) is None and turn.get(other.role) is not None
            if has_other and any(isinstance(one, dict) and one.get(style.role) is not None for one in turns):
                return [f"message {place} has {other.role!r} where others have {style.role!r}; write all turns alike"]
            if style.role not in turn:
                return [f"message {place} is not an object with {style.role!r}"]
            if turn.get(style.text) is None and isinstance(turn.get(other.text), str):
                return [f"message {place} has its text under {other.text!r}; with {style.role!r} goes {style.text!r}"]
        return []


MESSAGES = ChatRows("messages", OPENAI)
CONVERSATIONS = ChatRows("conversations", SHAREGPT)


def _untrained(turns: list[dict[str, Any]], style: TurnStyle) -> frozenset[int]:
    return frozenset(
        place
        for place, turn in enumerate(turns)
        if style.roles[turn[style.role]] == "assistant" and any(turn.get(mark) == 0 for mark in TRAINING_MARKS)
    )


def _mark_problems(turns: list[dict[str, Any]], style: TurnStyle) -> list[str]:
    """Return problems of training marks that cannot be applied: fractions, and marks on turns that are not answers."""
    found = []
    for place, turn in enumerate(turns, 1):
        given = {mark: turn[mark] for mark in TRAINING_MARKS if turn.get(mark) is not None}
        found += [
            f"message {place}: {mark!r} is neither 0 nor 1" for mark, value in given.items() if value not in (0, 1)
        ]
        wanted = [mark for mark, value in given.items() if value == 1]
        if wanted and style.roles[turn[style.role]] in ("user", "tool"):
            found.append(f"message {place}: {wanted[0]!r} asks to train it, and only answers are trained")
    answers = sum(style.roles[turn[style.role]] == "assistant" for turn in turns)
    if not found and len(_untrained(turns, style)) == answers:
        marks = sorted({mark for turn in turns for mark in TRAINING_MARKS if turn.get(mark) == 0})
        found.append(f"every answer is left out of training by {', '.join(map(repr, marks))}")
    return found


def _order_problems(messages: list[Message], first: int) -> list[str]:
    """Check that an answer is last and not first. The template decides which other orders it accepts."""
    if messages[0]["role"] == "assistant":
        return [f"message {first} is an answer without a message before it"]
    return [] if messages[-1]["role"] == "assistant" else ["it does not end with an answer"]


def _read(turn: dict[str, Any], style: TurnStyle, may_be_blank: bool = False) -> Message | str:
    """Return a turn as a message, or what is wrong with it."""
    given = turn[style.role]
    if not isinstance(given, str) or given not in style.roles:
        return f"the role {given!r} is none of {', '.join(style.roles)}"
    role = style.roles[given]
    return _read_openai(turn, role, may_be_blank) if style is OPENAI else _read_sharegpt(turn, role)


def in_order_of_calls(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort tool results into the order of their calls, since most templates do not render call ids."""
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
    """Return one of OpenAI's turns as a message for the template, or what is wrong with it.

    Args:
        turn: an object with a role.
        may_be_blank: whether a user message may be blank.
    """
    return _read(turn, OPENAI, may_be_blank)


def _read_openai(turn: dict[str, Any], role: str, may_be_blank: bool) -> Message | str:
    content = _joined(turn.get("content"))
    key = next((one for one in REASONING_KEYS if turn.get(one) is not None), REASONING_KEYS[0])
    reasoning = turn.get(key)
    calls = read_calls(turn.get("tool_calls") or _older_call(turn))
    if isinstance(calls, str):
        return calls
    if role != "assistant" and (calls or reasoning):
        return f"a message of {role} has {'tool calls' if calls else 'reasoning'}"
    if content is None and calls:
        content = ""
    if not isinstance(reasoning, str | None):
        return f"its {key!r} is {kind_of(reasoning)}"
    if reasoning and isinstance(content, str):
        content = with_reasoning(content, reasoning)
    message = _checked(role, content, calls, may_be_blank)
    name = turn.get("name")
    if role == "tool" and isinstance(name, str) and not isinstance(message, str):
        return HALF_A_PAIR if has_half_a_pair(name) else {**message, "name": name}
    return message


def _older_call(turn: dict[str, Any]) -> Any:
    """Return OpenAI's `function_call`, the deprecated form of one call, as a list of calls."""
    call = turn.get("function_call")
    return None if call is None else [call]


def _read_sharegpt(turn: dict[str, Any], role: str) -> Message | str:
    content = turn.get("value")
    if turn["from"] != "function_call":
        return _checked(role, content, [])
    called = parsed(content)
    calls = read_calls([called] if isinstance(called, dict) else called)
    if isinstance(calls, str):
        return calls
    return _checked("assistant", "", calls) if calls else "its call is neither a JSON object nor a list of some"


def _checked(role: str, content: Any, calls: list[dict[str, Any]], may_be_blank: bool = False) -> Message | str:
    if isinstance(content, list):
        kinds = [part.get("type") for part in content if isinstance(part, dict) and part.get("type") != "text"]
        return f"it has a part of type {kinds[0]!r}, and only text is trained" if kinds else "its text is a list"
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
    """Join a content that is a list of text parts; return any other content unchanged."""
    is_parts = isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    )
    return "".join(part["text"] for part in content) if is_parts else content
