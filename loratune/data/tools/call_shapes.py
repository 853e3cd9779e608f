"""Three shapes of a tool call in an answer, each with a parser; a template's renderings provide their literals."""

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
"""Name of a tool outside of JSON."""
JSON_TYPES: dict[type, tuple[str, ...]] = {
    str: ("string",), bool: ("boolean",), int: ("integer", "number"), float: ("number",), dict: ("object",),
    list: ("array",), type(None): ("null",),
}  # fmt: skip
PYTHON_WORDS = {"True": True, "False": False, "None": None}
"""How templates with Python syntax write JSON's true, false and null."""

Schemas = Mapping[str, Mapping[str, Any]]
"""Name of a tool → name of an argument → its schema."""
Read = tuple["Call", int]
"""A call and its end index."""


@dataclass(frozen=True)
class Call:
    name: str
    arguments: dict[str, Any]

    @property
    def arguments_text(self) -> str:
        """The arguments as JSON.

        Raises:
            ValueError: the arguments contain NaN or infinity.
        """
        text = json.dumps(self.arguments, ensure_ascii=False, allow_nan=False)
        return json.dumps(self.arguments) if has_half_a_pair(text) else text

    def in_message(self) -> dict[str, Any]:
        """Return the call in the form of chat templates and rows."""
        return {"type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def schemas_of(tools: Sequence[Mapping[str, Any]]) -> Schemas:
    """Return the argument schemas of tools."""
    schemas: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        parameters = tool["function"].get("parameters")
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        schemas[tool["function"]["name"]] = properties if isinstance(properties, dict) else {}
    return schemas


@dataclass(frozen=True)
class ObjectShape:
    """`{"name": NAME, "arguments": {…}}`, with any keys."""

    name: tuple[str, ...]
    """Path of keys to the name."""
    arguments: tuple[str, ...]
    are_text: bool
    """Whether the arguments are a string with the JSON of an object."""

    begins_with = "{"
    ends_with = "}"

    def read(self, text: str, start: int, schemas: Schemas) -> Read | None:
        """Parse the call at an index; None if there is no complete call."""
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
    """A name, a separator, and the arguments as a JSON object."""

    separator: str

    begins_with = ""
    ends_with = "}"

    def read(self, text: str, start: int, schemas: Schemas) -> Read | None:
        """See `ObjectShape.read`."""
        name = NAME.match(text, start)
        place = flexible(self.separator, BLANKS, BLANKS).match(text, name.end()) if name else None
        found = json_at(text, place.end()) if place else None
        return _checked(name[0], *found) if name and found else None


@dataclass(frozen=True)
class ParameterShape:
    """A name, then each argument separately: NAME `first` KEY `equals` VALUE `between` KEY `equals` VALUE `end`."""

    first: str
    equals: str
    between: str
    end: str
    empty: str
    """Text after the name of a call without arguments."""

    begins_with = ""

    @property
    def ends_with(self) -> str:
        """The last character of a call."""
        return self.end.rstrip()[-1:]

    def read(self, text: str, start: int, schemas: Schemas) -> Read | None:
        """See `ObjectShape.read`. Values are converted to the types in their schemas."""
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
    """Return a pattern for a literal of a template that tolerates other whitespace between its words.

    Args:
        literal: the literal.
        lead: pattern of text allowed before it; None allows exactly its leading whitespace, or none.
        tail: the same for text after it.
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
    """Return the JSON object at an index and its end; None if there is no complete object."""
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
    """Return a call that can be serialised as JSON, and its end; None if it cannot."""
    if not isinstance(name, str) or not name or has_half_a_pair(name) or not isinstance(arguments, dict):
        return None
    call = Call(name, arguments)
    try:
        _ = call.arguments_text
    except (ValueError, RecursionError):
        return None
    return call, end


def _typed(text: str, schema: Any) -> Any:
    """Convert an unquoted value to its schema's type; return the text if nothing else matches."""
    wanted = _types(schema)
    if wanted == {"string"}:
        return text
    try:
        value = PYTHON_WORDS[text] if text in PYTHON_WORDS else json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text
    if isinstance(value, str):  # the quotes belong to the value
        return text
    return value if not wanted or wanted.intersection(JSON_TYPES[type(value)]) else text


def _types(schema: Any) -> set[str]:
    """Return the types that a schema allows; empty if it does not restrict them."""
    if not isinstance(schema, dict):
        return set()
    given = schema.get("type")
    if given is None:
        options = schema.get("anyOf") or schema.get("oneOf") or []
        return set().union(*map(_types, options)) if isinstance(options, list) else set()
    return {one for one in (given if isinstance(given, list) else [given]) if isinstance(one, str)}
