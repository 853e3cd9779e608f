"""Parses the text of a flag into the value that it would have in a recipe."""

from __future__ import annotations

import re
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from loratune.recipe.yaml_reader import read_yaml

SEVERAL = re.compile(r",\s*[A-Za-z_]\w*=")
"""What shows in the value of a pair that several pairs were given at once."""


def is_text(annotation: Any) -> bool:
    """Return whether a setting's flag is used as typed, because the setting is a string or a choice."""
    if get_origin(annotation) in (Union, types.UnionType):
        return all(is_text(kind) for kind in get_args(annotation) if kind is not type(None))
    return annotation is str or get_origin(annotation) is Literal


def is_list(annotation: Any) -> bool:
    """Return whether a setting's flag may be repeated."""
    if get_origin(annotation) in (Union, types.UnionType):
        return any(is_list(kind) for kind in get_args(annotation))
    return get_origin(annotation) in (list, dict)


def parse_flag(given: Any, field: FieldInfo) -> Any:
    """Parse a flag: strings are used as typed, everything else is parsed as YAML."""
    kind = field.annotation
    if isinstance(given, bool):
        return given
    if get_origin(kind) is dict:
        pairs = dict(_parse_pair(pair) for pair in _listed(given))
        is_plain = is_text(_without_bounds(get_args(kind)[1]))
        return pairs if is_plain else {name: _parse_yaml(value) for name, value in pairs.items()}
    if is_list(kind):
        texts = _listed(given)
        is_choices = get_origin(kind) is list and get_origin(get_args(kind)[0]) is Literal
        if is_choices and (joint := next((text for text in texts if "," in text), "")):
            raise ValueError(f"give the flag once for each name, got {joint!r}")
        items = [_parse_entry(text) for text in texts]
        is_number_or_list = get_origin(kind) is not list
        if is_number_or_list and len(items) > 1 and any(isinstance(_parse_yaml(item), float | int) for item in texts):
            raise ValueError(f"give one number, or names alone; got {', '.join(map(str, items))}")
        if len(items) > 1 or get_origin(kind) is list or isinstance(items[0], dict):
            return items
        number = _parse_yaml(items[0]) if isinstance(items[0], str) else None
        return number if isinstance(number, int | float) else items[0]
    if is_text(kind):
        return None if given == "null" and type(None) in get_args(kind) else given
    return _parse_yaml(given)


def _listed(given: str | list[str]) -> list[str]:
    return given if isinstance(given, list) else [given]


def _without_bounds(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _parse_entry(text: str) -> Any:
    """Parse a list item: a string, or settings such as `{path: rows.json, weight: 10}`."""
    return _parse_yaml(text) if text.startswith("{") else text


def _parse_pair(pair: str) -> tuple[str, str]:
    name, equals, value = pair.partition("=")
    if not equals or not name:
        raise ValueError(f"write name=value, got {pair!r}")
    if SEVERAL.search(value):
        raise ValueError(f"give the flag once for each name=value, got {pair!r}; a recipe takes such a value as it is")
    return name, value


def _parse_yaml(text: str) -> Any:
    document = read_yaml(text)
    if document.problems:
        raise ValueError(f"cannot read {text!r}")
    return document.values
