"""Reads JSON files that loratune wrote into typed dataclasses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from loratune.errors import Exit, LoratuneError
from loratune.plain_files import read_json_object

Kind = TypeVar("Kind")
_adapter: Callable[[Any], TypeAdapter[Any]] = cache(TypeAdapter)
"""Making one takes milliseconds, and a folder may hold a thousand files of one kind."""
BESIDE = "x-beside"
WRITTEN_BESIDE = Field(json_schema_extra={BESIDE: True})
"""Of a field whose own fields are written beside the others of its object."""


def read_typed(kind: type[Kind], path: Path, version: int) -> Kind:
    """Read a file of one format version; keys that this version of the program does not know are left out.

    Args:
        kind: the dataclass of the file's values.
        path: of the file.
        version: the format version that is read.

    Raises:
        LoratuneError: it is missing, damaged, or written by a later version of loratune.
    """
    values = read_json_object(path)
    require_version(values, version, path)
    return as_typed(kind, values, path)


def as_typed(kind: type[Kind], values: Mapping[str, Any], path: Path) -> Kind:
    """Make an object of the values that its class has fields for, and check their types.

    Args:
        kind: a dataclass, or a section of settings.
        values: what the file holds.
        path: of the file, for the message.

    Raises:
        LoratuneError: a value is missing that has no default, or is of another type.
    """
    try:
        made: Kind = _adapter(kind).validate_python(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in problem["loc"])
        raise LoratuneError(f"{path}: damaged: {place}: {problem['msg']}", Exit.MODEL) from error
    return made


def require_version(values: Mapping[str, Any], known: int, path: Path) -> None:
    """Refuse a file of an unknown format version; files without a version have the first one.

    Raises:
        LoratuneError: with both versions.
    """
    found = values.get("format_version", 1)
    if found != known:
        raise LoratuneError(
            f"{path}: made by another version of loratune (format {found}, this one reads {known})", Exit.MODEL
        )
