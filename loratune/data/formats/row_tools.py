"""Parses the tools of a row, and tool calls, in OpenAI's and ShareGPT's forms."""

from __future__ import annotations

import json
from typing import Any

from loratune.data.formats.conversation import has_half_a_pair, is_deeper, kind_of

HALF_A_PAIR = "holds an unpaired UTF-16 surrogate"
DEEPEST = 100
"""Maximum nesting of lists and objects: Python, Jinja and the template process them recursively."""
TOO_DEEP = f"nested more than {DEEPEST} levels deep"


def tools_of(value: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return the tools of a row, each as OpenAI's {"type": "function", "function": {…}}."""
    tools = read_tools(given_tools(value))
    return () if isinstance(tools, str) else tuple(tools)


def read_calls(given: Any) -> list[dict[str, Any]] | str:
    """Return tool calls with their arguments as objects, as most templates expect, or what is wrong with them."""
    if is_deeper(given, DEEPEST):
        return f"its tool calls are {TOO_DEEP}"
    given = _without_nulls(given)
    if given is None:
        return []
    if not isinstance(given, list):
        return f"its tool calls are {kind_of(given)}, not a list"
    calls = []
    for place, call in enumerate(given, 1):
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            return f"call {place} is no object with the 'name' of a tool"
        arguments = parsed(function.get("arguments"))
        if not isinstance(arguments, dict):
            return f"call {place} ({name}): 'arguments' are neither an object nor the JSON text of one"
        if is_deeper(arguments, DEEPEST):
            return f"call {place} ({name}): 'arguments' are {TOO_DEEP}"
        calls.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    return HALF_A_PAIR if has_half_a_pair(json.dumps(calls, ensure_ascii=False)) else calls


def given_tools(value: dict[str, Any]) -> Any:
    """Return a row's or a request's `tools`, or the deprecated `functions`."""
    return value["tools"] if value.get("tools") is not None else value.get("functions")


def read_tools(given: Any) -> list[dict[str, Any]] | str:
    """Return tools, each as OpenAI's {"type": "function", "function": {…}}, or what is wrong with them."""
    tools = parsed(given)
    if is_deeper(tools, DEEPEST):
        return f"'tools' are {TOO_DEEP}"
    tools = tools if isinstance(given, str) else _without_nulls(tools)
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
    """Remove the null keys that Arrow adds to the objects of a column; nulls in lists stay, as in TRL.

    Nulls inside a JSON text were written on purpose, and stay.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def parsed(value: Any) -> Any:
    """Return the value of a JSON text, None if it is invalid; return any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None
