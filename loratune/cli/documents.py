"""The JSON documents that commands print with --json: their names, versions and schemas."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from loratune import console
from loratune.runtime import is_started_by_loratune

_AWAITED: ContextVar[bool] = ContextVar("awaited", default=False)
KEY = "schema"
"""Key of a document's name and version."""


@dataclass(frozen=True)
class Document:
    """What a command prints with --json. Removing a key or changing its meaning raises the version."""

    name: str
    """The command's, with a hyphen for a blank: runs-show."""
    version: int
    kind: Callable[[], Any]
    """Imports and returns the type of its values: a TypedDict, a dataclass, or a union of them."""

    @property
    def schema(self) -> str:
        """Name and version, as the document says them."""
        return f"loratune/{self.name}/{self.version}"

    def of(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the document in JSON types."""
        from pydantic_core import to_jsonable_python

        return {KEY: self.schema, **to_jsonable_python(values)}

    def write(self, values: Mapping[str, Any]) -> None:
        """Print the document, after which an error is told on stderr alone."""
        _AWAITED.set(False)
        console.write_json(self.of(values))

    def json_schema(self) -> dict[str, Any]:
        """Return the JSON Schema of the document."""
        from loratune.cli.json_schema import schema_of

        return schema_of(self.kind(), self.schema, {KEY: {"const": self.schema}})


def await_document(arguments: Sequence[str]) -> None:
    """Remember whether a command line asks for a document; of several processes, the one that starts them prints it."""
    _AWAITED.set("--json" in arguments and not is_started_by_loratune())


def is_awaited() -> bool:
    """Return whether a document is asked for and not printed yet."""
    return _AWAITED.get()
