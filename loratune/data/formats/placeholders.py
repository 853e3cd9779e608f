"""Sets values in for `{{name}}` in the texts of rows, and tells the placeholders and the values that do not match."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from loratune.nearest import nearest
from loratune.printable import shortened

PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")
# The two placeholders in published identity datasets; others may be literal text.
MUST_BE_FILLED = ("name", "author")
MOST_LITERAL = 100
"""Rows of templates or code may hold any number."""
SHOWN = 5
"""Names in a message, and hints at what is meant by them."""


class Filler:
    """Fills placeholders, ignoring case, and records those without a value and the values that are used."""

    def __init__(self, placeholders: Mapping[str, str]) -> None:
        self.values = {name.lower(): value for name, value in placeholders.items()}
        self.missing: set[str] = set()
        """Required placeholders without a value."""
        self.literal: set[str] = set()
        """Other placeholders without a value, as they are written; at most MOST_LITERAL."""
        self.used: set[str] = set()

    def __call__(self, text: str) -> str:
        return text if "{{" not in text else PLACEHOLDER.sub(self._value, text)

    def all_texts(self, value: Any) -> Any:
        """Return a JSON value with every string except keys filled."""
        if isinstance(value, dict):
            return {key: self.all_texts(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.all_texts(inner) for inner in value]
        return self(value) if isinstance(value, str) else value

    def _value(self, match: re.Match[str]) -> str:
        name = match[1].lower()
        if name in self.values:
            self.used.add(name)
            return self.values[name]
        if name in MUST_BE_FILLED:
            self.missing.add(name)
        elif len(self.literal) < MOST_LITERAL:
            self.literal.add(match[1])
        return match[0]


def braced(names: Iterable[str]) -> str:
    """List the first names as placeholders, each once."""
    listed = ["{{" + shortened(name) + "}}" for name in dict.fromkeys(names)]
    return ", ".join([*listed[:SHOWN], *(["…"] if len(listed) > SHOWN else [])])


def describe_unfilled(names: Sequence[str], given: Collection[str] = ()) -> str:
    """Describe required placeholders without a value, and the flags that set them.

    Args:
        names: of the placeholders.
        given: names that data.placeholders has a value for.
    """
    flags = " ".join(f"--data.placeholders {shlex.quote(f'{name}=TEXT')}" for name in names)
    return f"rows hold {braced(names)}; give values in data.placeholders{_meant(names, given)}, or as {flags}"


def describe_literal(names: Sequence[str], given: Collection[str]) -> str:
    """Describe other placeholders without a value. See `describe_unfilled`."""
    return (
        f"rows hold {braced(names)}, for which data.placeholders has no value{_meant(names, given)}: such text stays "
        "as it is"
    )


def describe_unused(given: Iterable[str], used: Collection[str]) -> str:
    """Describe the names that data.placeholders has a value for and no row holds; empty if there are none."""
    unused = [name for name in given if name.lower() not in used]
    return f"data.placeholders has values for what no row holds: {braced(unused)}" if unused else ""


def _meant(names: Iterable[str], given: Collection[str]) -> str:
    """Return hints at the given names that some of the placeholders are most like; empty if there is none."""
    found = ((name, nearest(name.lower(), map(str.lower, given))) for name in names)
    hints = (f"{shortened(near)!r} for {shortened(name)!r}" for name, near in found if near)
    listed = ", ".join(islice(hints, SHOWN))
    return f" (it has {listed})" if listed else ""
