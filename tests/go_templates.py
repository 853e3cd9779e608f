"""Go's template language and Ollama's values, as much as a TEMPLATE may use; written from Go's documentation.

Beside the language: what Ollama makes of a request before the template sees it, and how Go writes JSON.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

TOKEN = re.compile(r'\s*("(?:\\.|[^"\\])*"|:=|[()=,]|\d+|\$?[\w.]+|\$)')
ACTION = re.compile(r'\{\{(-(?=\s))?((?:"(?:\\.|[^"\\])*"|[^"}]|\}(?!\}))*?)(\s-)?\}\}', re.DOTALL)


# --- what Ollama hands to a template ---


def ollama_values(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """`.System` is all system messages, turns of one role but a tool's are one; JSON goes through Go's structs."""
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    turns: list[dict[str, Any]] = []
    for message in messages:
        if turns and turns[-1]["Role"] == message["role"] != "tool":
            turns[-1]["Content"] += "\n\n" + message["content"]
            continue
        calls = [{"Function": _fields(call["function"])} for call in message.get("tool_calls") or []]
        turns.append({"Role": message["role"], "Content": message["content"], "ToolCalls": calls})
    return {"System": system, "Messages": turns, "Tools": [{"Function": _function(tool)} for tool in tools or []]}


def _fields(function: dict[str, Any]) -> dict[str, Any]:
    return {"Name": function["name"], "Arguments": _sorted(function["arguments"])}  # a map of Go's has its own order


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool["function"]
    return {
        "Name": function["name"],
        "Description": function.get("description", ""),
        "Parameters": go_schema(function["parameters"]),
    }


def go_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """A tool's schema as Ollama's struct writes it: its own keys in its own order, properties by name."""
    properties = {
        name: {key: value[key] for key in ("type", "description", "enum") if value.get(key)}
        for name, value in sorted(schema.get("properties", {}).items())
    }
    required = {"required": schema["required"]} if schema.get("required") else {}
    return {"type": schema["type"], **required, "properties": properties}


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(one) for one in value] if isinstance(value, list) else value


def go_json(value: Any) -> str:
    """json.Marshal: no blanks, and signs of HTML are escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


# --- the language ---


@dataclass
class Node:
    """A text, an action, or a block with its branches."""

    kind: str
    text: str = ""
    body: list[Node] = field(default_factory=list)
    other: list[Node] = field(default_factory=list)


def run_template(template: str, values: dict[str, Any]) -> str:
    """What Go's text/template writes."""
    nodes, rest, closed = _parse(_split(template))
    assert (rest, closed) == ([], ""), "an end without a beginning"
    return _run(nodes, values, [{"$": values}])


def plain_texts(template: str) -> list[str]:
    """The texts outside of actions, as Go's parser has them."""
    return [text for kind, text in _split(template) if kind == "text"]


def _split(template: str) -> list[tuple[str, str]]:
    pieces: list[tuple[str, str]] = []
    place, trims = 0, False
    for action in ACTION.finditer(template):
        text = template[place : action.start()]
        text = text.lstrip() if trims else text
        text = text.rstrip() if action[1] else text
        pieces += [("text", text)] if text else []
        pieces.append(("action", action[2].strip()))
        place, trims = action.end(), bool(action[3])
    text = template[place:].lstrip() if trims else template[place:]
    assert "{{" not in text
    return pieces + ([("text", text)] if text else [])


def _parse(pieces: list[tuple[str, str]]) -> tuple[list[Node], list[tuple[str, str]], str]:
    """Nodes up to the end or else that closes them, what follows, and what has closed them."""
    nodes: list[Node] = []
    while pieces:
        (kind, text), *pieces = pieces
        word = text.partition(" ")[0]
        if kind == "text":
            nodes.append(Node("text", text))
        elif word in ("end", "else"):
            return nodes, pieces, text
        elif word in ("if", "range"):
            node, pieces = _block(word, text.removeprefix(word), pieces)
            nodes.append(node)
        else:
            nodes.append(Node("action", text))
    return nodes, [], ""


def _block(kind: str, condition: str, pieces: list[tuple[str, str]]) -> tuple[Node, list[tuple[str, str]]]:
    body, pieces, closed = _parse(pieces)
    if closed.startswith("else if "):
        other, pieces = _block("if", closed.removeprefix("else if"), pieces)
        return Node(kind, condition, body, [other]), pieces
    others: list[Node] = []
    if closed == "else":
        others, pieces, closed = _parse(pieces)
    assert closed == "end", f"{kind} {condition} is not closed"
    return Node(kind, condition, body, others), pieces


def _run(nodes: list[Node], dot: Any, scopes: list[dict[str, Any]]) -> str:
    scopes = [*scopes, {}]
    return "".join(_write(node, dot, scopes) for node in nodes)


def _write(node: Node, dot: Any, scopes: list[dict[str, Any]]) -> str:
    if node.kind == "text":
        return node.text
    if node.kind == "if":
        return _run(node.body if _Reader(node.text, dot, scopes).pipeline() else node.other, dot, scopes)
    if node.kind == "range":
        return _range(node, dot, scopes)
    value = _Reader(node.text, dot, scopes).pipeline(assigns=True)
    return "" if value is None else str(value)


def _range(node: Node, dot: Any, scopes: list[dict[str, Any]]) -> str:
    names, sign, expression = node.text.rpartition(":=")
    over = _Reader(expression if sign else node.text, dot, scopes).pipeline()
    pairs = over.items() if isinstance(over, dict) else enumerate(over)
    output = ""
    for key, value in pairs:
        named = dict(zip((name.strip() for name in names.split(",")), (key, value), strict=True)) if sign else {}
        output += _run(node.body, value, [*scopes, named])
    return output


class _Reader:
    """Evaluates one pipeline."""

    def __init__(self, text: str, dot: Any, scopes: list[dict[str, Any]]) -> None:
        self.tokens, text = list[str](), text.rstrip()
        while text:
            token = TOKEN.match(text)
            assert token, f"no token of Go's: {text}"
            self.tokens.append(token[1])
            text = text[token.end() :]
        self.dot, self.scopes = dot, scopes

    def pipeline(self, assigns: bool = False) -> Any:
        """The value; None for an assignment, which writes nothing."""
        if len(self.tokens) > 1 and self.tokens[1] in (":=", "="):
            assert assigns
            name, sign, *self.tokens = self.tokens
            value = self._call()
            scope = self.scopes[-1] if sign == ":=" else next(s for s in reversed(self.scopes) if name in s)
            scope[name] = value
            return None
        value = self._call()
        assert not self.tokens, f"left over: {self.tokens}"
        return value

    def _call(self) -> Any:
        head = self.tokens[0]
        if head not in FUNCTIONS:
            return self._operand()
        self.tokens.pop(0)
        values = []
        while self.tokens and self.tokens[0] != ")":
            values.append(self._operand())
        return FUNCTIONS[head](*values)

    def _operand(self) -> Any:
        token = self.tokens.pop(0)
        if token == "(":
            value = self._call()
            assert self.tokens.pop(0) == ")"
            return self._fields(value, self.tokens.pop(0)) if self.tokens and self.tokens[0][0] == "." else value
        if token[0] == '"':
            return json.loads(token)
        if token.isdigit():
            return int(token)
        name, dot, path = token.partition(".")
        if name in ("true", "false"):
            return name == "true"
        start = self.dot if not name else next(scope[name] for scope in reversed(self.scopes) if name in scope)
        return self._fields(start, dot + path)

    def _fields(self, value: Any, path: str) -> Any:
        for name in filter(None, path.split(".")):
            value = value[name]
        return value


FUNCTIONS: dict[str, Any] = {
    "eq": lambda one, other: one == other,
    "ne": lambda one, other: one != other,
    "not": lambda value: not value,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "or": lambda *values: next((value for value in values if value), values[-1]),
    "len": len,
    "slice": lambda value, start: value[start:],
    "index": lambda value, place: value[place],
    "json": go_json,
}
