"""What one call of a tool looks like in an answer, and how it is read: three shapes, whose texts a template shows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NoReturn

from loratune.data.formats.conversation import has_half_a_pair

BLANKS = r"\s*"
NAME = re.compile(r"[\w.:/-]+")
"""Of a tool, where no JSON holds it."""
JSON_TYPES: dict[type, tuple[str, ...]] = {
    str: ("string",), bool: ("boolean",), int: ("integer", "number"), float: ("number",), dict: ("object",),
    list: ("array",), type(None): ("null",),
}  # fmt: skip
PYTHON_WORDS = {"True": True, "False": False, "None": None}
"""As templates write what JSON calls true, false and null."""

Schemas = Mapping[str, Mapping[str, Any]]
"""Name of a tool → the schemas of its arguments by their names."""
Read = tuple["Call", int]
"""A call, and where it ends."""


@dataclass(frozen=True)
class Call:
    """A call of a tool."""

    name: str
    arguments: dict[str, Any]

    @property
    def arguments_text(self) -> str:
        """The arguments as JSON.

        Raises:
            ValueError: JSON has no word for a number in them.
        """
        text = json.dumps(self.arguments, ensure_ascii=False, allow_nan=False)
        return json.dumps(self.arguments) if has_half_a_pair(text) else text

    def in_message(self) -> dict[str, Any]:
        """The call as chat templates and rows have it."""
        return {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def schemas_of(tools: Sequence[Mapping[str, Any]]) -> Schemas:
    """What is known of the arguments of tools."""
    schemas: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        parameters = tool["function"].get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        schemas[tool["function"]["name"]] = properties if isinstance(properties, dict) else {}
    return schemas


@dataclass(frozen=True)
class ObjectShape:
    """`{"name": NAME, "arguments": {…}}`, under any keys."""

    name: tuple[str, ...]
    """Keys that lead to the name."""
    arguments: tuple[str, ...]
    are_text: bool
    """Whether the arguments are the JSON text of an object."""

    begins_with = "{"
    ends_with = "}"

    def read(self, text: str, start: int, schemas: Schemas) -> Read | None:
        """The call at a place of a text; None if none is there, or not the whole of it."""
        found = json_at(text, start)
        if found is None:
            return None
        value, end = found
        name, arguments = _inner(value, self.name), _inner(value, self.arguments)
        if self.are_text and isinstance(arguments, str):
            whole = json_at(arguments, 0)
            arguments = whole[0] if whole and not arguments[whole[1] :].strip() else None
        return _checked(name, arguments, end)


@dataclass(frozen=True)
class NamedShape:
    """A name, a text behind it, and the arguments as a JSON object."""

    separator: str

    begins_with = ""
    ends_with = "}"

    def read(self, text: str, start: int, schemas: Schemas) -> Read | None:
        """As that of `ObjectShape`."""
        name = NAME.match(text, start)
        place = flexible(self.separator, BLANKS, BLANKS).match(text, name.end()) if name else None
        found = json_at(text, place.end()) if place else None
        return _checked(name[0], *found) if name and found else None


@dataclass(frozen=True)
class ParameterShape:
    """A name, then each argument apart: NAME `first` KEY `equals` VALUE `between` KEY `equals` VALUE `end`."""

    first: str
    equals: str
    between: str
    end: str
    empty: str
    """Stands behind the name of a call without arguments."""

    begins_with = ""

    @property
    def ends_with(self) -> str:
        """Its last character."""
        return self.end.rstrip()[-1:]

    def read(self, text: str, start: int, schemas: Schemas) -> Read | None:
        """As that of `ObjectShape`; texts become what the schema of their argument asks for."""
        name = NAME.match(text, start)
        if not name:
            return None
        if nothing := flexible(self.empty).match(text, name.end()):
            return _checked(name[0], {}, nothing.end())
        place, arguments = flexible(self.first).match(text, name.end()), {}
        while place:
            key = self._key.match(text, place.end())
            following = self._following.search(text, key.end()) if key else None
            if not key or not following:
                return None
            schema = schemas.get(name[0], {}).get(key[1])
            arguments[key[1]] = _typed(text[key.end() : following.start()], schema)
            if following["between"] is None:
                return _checked(name[0], arguments, following.end())
            place = following
        return None

    @cached_property
    def _key(self) -> re.Pattern[str]:
        return re.compile(rf"([^\n]+?){flexible(self.equals).pattern}")

    @cached_property
    def _following(self) -> re.Pattern[str]:
        return re.compile(rf"(?P<between>{flexible(self.between).pattern})|{flexible(self.end).pattern}")


Shape = ObjectShape | NamedShape | ParameterShape


@lru_cache(maxsize=256)
def flexible(literal: str, lead: str | None = None, tail: str | None = None) -> re.Pattern[str]:
    """Finds a text of a template, with other blanks between its words, as models write them.

    Args:
        literal: the text.
        lead: pattern of what may stand before it; None takes exactly the blanks that it begins with, or none.
        tail: the same of what may stand behind it.
    """
    words = literal.split()
    if not words:
        return re.compile(r"\s+" if literal else "")
    if lead is None:
        lead = f"(?:{re.escape(literal[: len(literal) - len(literal.lstrip())])})?"
    if tail is None:
        tail = f"(?:{re.escape(literal[len(literal.rstrip()) :])})?"
    return re.compile(lead + r"\s*".join(map(re.escape, words)) + tail)


def json_at(text: str, start: int) -> tuple[Any, int] | None:
    """The JSON object at a place of a text, and where it ends; None if none is there, or not the whole of it."""
    if not text.startswith("{", start):
        return None
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


def _inner(value: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _checked(name: Any, arguments: Any, end: int) -> Read | None:
    """A call that can be told to a client, and its end."""
    if not isinstance(name, str) or not name or has_half_a_pair(name) or not isinstance(arguments, dict):
        return None
    call = Call(name, arguments)
    try:
        _ = call.arguments_text
    except (ValueError, RecursionError):
        return None
    return call, end


def _typed(text: str, schema: Any) -> Any:
    """A value that is written without quotes, as its schema has it; the text itself where nothing else fits."""
    wanted = _types(schema)
    if wanted == {"string"}:
        return text
    try:
        value = PYTHON_WORDS[text] if text in PYTHON_WORDS else json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text
    if isinstance(value, str):  # the quotes are its own
        return text
    return value if not wanted or wanted.intersection(JSON_TYPES[type(value)]) else text


def _types(schema: Any) -> set[str]:
    """The types that a schema allows; empty if it does not say."""
    if not isinstance(schema, dict):
        return set()
    given = schema.get("type")
    if given is None:
        options = schema.get("anyOf") or schema.get("oneOf") or []
        return set().union(*map(_types, options)) if isinstance(options, list) else set()
    return {one for one in (given if isinstance(given, list) else [given]) if isinstance(one, str)}
