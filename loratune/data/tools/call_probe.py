"""Derives the form of tool calls from renderings of a chat template, and verifies it by parsing them back."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loratune.data.tools.call_form import CallForm, CallStream
from loratune.data.tools.call_shapes import (
    BLANKS,
    Call,
    NamedShape,
    ObjectShape,
    ParameterShape,
    Shape,
    flexible,
    json_at,
    schemas_of,
)

Write = Callable[[str, Sequence[Call]], str | None]
"""Render an answer with text and calls of PROBE_TOOLS; None if the template rejects it.

The result has characters of `CallForm.marks` for special tokens, and is stripped.
"""

NAMES = ("loratune_probe", "another_probe")
KEYS, VALUES = ("place_of_it", "time_of_it"), ("loratune-rome", "loratune-noon")
ARGUMENTS = {KEYS[0]: VALUES[0]}
CONTENT = "Let me look."
HARD: dict[str, Any] = {
    "note": 'Say "hi"\nto {her} </b>, \\ it\'s 你好 é 🙂',
    "code": "05",
    "count": -3,
    "share": 0.25,
    "is_new": True,
    "deep": {"tags": ["a", 1, 2.5, True, None, {}], "of": {"city": "Zürich"}},
    "list": [],
}
_TYPES = {"count": "integer", "share": "number", "is_new": "boolean", "deep": "object", "list": "array"}
PROBE_TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "A probe.",
            "parameters": {
                "type": "object",
                "properties": {key: {"type": _TYPES.get(key, "string")} for key in (*KEYS, *HARD)},
            },
        },
    }
    for name in NAMES
]


def find_call_form(write: Write, marks: Mapping[str, str]) -> CallForm | None:
    """Return the form of a template's calls.

    Args:
        write: renders answers.
        marks: placeholder character for each special token.

    Returns:
        None if the form is unknown, or parsing does not return the rendered calls.
    """
    one, other = (Call(name, ARGUMENTS) for name in NAMES)
    single, pair = write("", [one]), write("", [one, other])
    if single is None:
        return None
    for find in (_find_object, _find_named, _find_parameters):
        form = find(write, single, pair)
        if form is None:
            continue
        used = {character: marks[character] for character in _literals(form) if character in marks}
        form = CallForm(form.opening, form.shape, form.closing, form.between, used)
        if _comes_back(form, write):
            return form
    return None


def _find_object(write: Write, single: str, pair: str | None) -> CallForm | None:
    for start in (place for place, character in enumerate(single) if character == "{"):
        found = json_at(single, start)
        name = _path_to(found[0], _equals(NAMES[0])) if found else None
        if not found or name is None:
            continue
        for are_text, is_wanted in ((False, _equals(ARGUMENTS)), (True, _is_text_of_arguments)):
            if arguments := _path_to(found[0], is_wanted):
                shape = ObjectShape(name, arguments, are_text)
                return _framed(single[:start], shape, single[found[1] :], pair, "{")
    return None


def _find_named(write: Write, single: str, pair: str | None) -> CallForm | None:
    opening, _, rest = single.partition(NAMES[0])
    start = rest.find("{")
    while start >= 0:
        found = json_at(rest, start)
        if found and found[0] == ARGUMENTS and rest[:start]:
            return _framed(opening, NamedShape(rest[:start]), rest[found[1] :], pair, NAMES[1])
        start = rest.find("{", start + 1)
    return None


def _find_parameters(write: Write, single: str, pair: str | None) -> CallForm | None:
    none = write("", [Call(NAMES[0], {})])
    two = write("", [Call(NAMES[0], dict(zip(KEYS, VALUES, strict=True)))])
    parts = _cut(two or "", [NAMES[0], KEYS[0], VALUES[0], KEYS[1], VALUES[1]])
    if not parts or not none or not none.startswith(parts[0] + NAMES[0]):
        return None
    opening, first, equals, between, equals_again, behind = parts
    start = (pair or "").find(NAMES[1])
    others = _cut((pair or "")[:start], [NAMES[0], KEYS[0], VALUES[0]]) if start >= 0 else None
    # Separates the end of one call from the end of the list of calls.
    end = os.path.commonprefix([behind, others[3]]) if others else behind  # noqa: RUF071 - of texts
    closing, empty = behind[len(end) :], none[len(opening) + len(NAMES[0]) :]
    is_one_way = equals == equals_again and between and end and not (between.startswith(end) or end.startswith(between))
    if not is_one_way or not empty.endswith(closing) or not equals:
        return None
    shape = ParameterShape(first, equals, between, end, empty.removesuffix(closing))
    return _framed(opening, shape, closing, pair, NAMES[1])


def _framed(opening: str, shape: Shape, closing: str, pair: str | None, second: str) -> CallForm | None:
    """Return the form, including the text between calls if calls are not opened and closed separately.

    Args:
        opening, shape, closing: the form of one call.
        pair: rendering of two calls; None if the template accepts only one.
        second: the first characters of the second call.
    """
    if any(name in opening + closing for name in NAMES):
        return None
    form = CallForm(opening, shape, closing)
    head = flexible(opening, "", BLANKS).match(pair or "")
    if pair is None or not head:
        return form if pair is None else None
    read = shape.read(pair, head.end(), schemas_of(PROBE_TOOLS))
    if not read:
        return None
    between, is_found, _ = pair[read[1] :].partition(second)
    if not is_found:
        return None
    is_repeated = form.in_words(between) == form.in_words(closing + opening)
    return form if is_repeated else CallForm(opening, shape, closing, between)


def _comes_back(form: CallForm, write: Write) -> bool:
    """Return whether calls of all kinds are parsed as they were rendered."""
    first, second, none = Call(NAMES[0], HARD), Call(NAMES[1], ARGUMENTS), Call(NAMES[0], {})
    for calls in ([first], [second], [none], [first, second], [none, first, second]):
        for content in ("", CONTENT):
            text = write(content, calls)
            if text is None:
                if len(calls) == 1:
                    return False
                continue  # some templates accept one call only
            content = content if content in text else ""  # some templates drop the text before a call
            if form.is_bare and content:
                continue  # text before a bare call makes it plain text
            if CallStream(form, PROBE_TOOLS).push(text, is_last=True) != (content, tuple(calls)):
                return False
    return True


def _literals(form: CallForm) -> str:
    shape = form.shape
    own = [getattr(shape, name) for name in ("separator", "first", "equals", "between", "end", "empty")
           if hasattr(shape, name)]  # fmt: skip
    return "".join([form.opening, form.closing, form.between, *own])


def _path_to(value: Any, is_wanted: Callable[[Any], bool]) -> tuple[str, ...] | None:
    """Return the keys that lead to a matching value in nested objects; None if there is none."""
    if not isinstance(value, dict):
        return None
    for key, inner in value.items():
        if is_wanted(inner):
            return (key,)
        if path := _path_to(inner, is_wanted):
            return (key, *path)
    return None


def _equals(wanted: Any) -> Callable[[Any], bool]:
    return lambda value: bool(value == wanted)


def _is_text_of_arguments(value: Any) -> bool:
    return isinstance(value, str) and json_at(value, 0) == (ARGUMENTS, len(value))


def _cut(text: str, marks: Sequence[str]) -> list[str] | None:
    """Return the texts before, between and after marks that occur in this order; None if one is missing."""
    parts = []
    for mark in marks:
        part, found, text = text.partition(mark)
        if not found:
            return None
        parts.append(part)
    return [*parts, text]
