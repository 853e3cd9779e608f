"""Builds the command lines that messages suggest, complete and quoted for a shell."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class CommandLine:
    """A command, as JSON has it."""

    purpose: str
    line: str
    """Quoted for a shell."""
    chosen: Mapping[str, str]
    """Placeholders in the line → what they stand for."""


@dataclass(frozen=True)
class Command:
    """A command line and its purpose."""

    purpose: str
    """What it does, such as `serve it`."""
    words: tuple[str, ...]
    """The words of the line, unquoted."""
    chosen: Mapping[str, str] = field(default_factory=dict)
    """Placeholders for the user to fill in: a capitalised word within `words` → its meaning."""

    @property
    def line(self) -> str:
        """The quoted command line."""
        return shlex.join(self.words)

    @property
    def told(self) -> CommandLine:
        """The command, as JSON has it."""
        return CommandLine(self.purpose, self.line, dict(self.chosen))

    def __str__(self) -> str:
        told = "".join(f"  ({name}: {meaning})" for name, meaning in self.chosen.items())
        return f"{self.purpose}: {self.line}{told}"


def loratune(
    purpose: str, command: str, flags: Mapping[str, object], chosen: Mapping[str, str] | None = None
) -> Command:
    """Return a command of loratune.

    Args:
        purpose: what it does.
        command: such as `merge` or `data check`.
        flags: see `flag_values`.
        chosen: see `Command`.
    """
    return Command(purpose, ("loratune", *command.split(), *flag_words(flags)), chosen or {})


def flag_words(flags: Mapping[str, object]) -> list[str]:
    """Return the words of flags, each value as a word of its own; see `flag_values`."""
    return [word for name, value in flag_values(flags) for word in (name, value) if word is not None]


def flag_values(flags: Mapping[str, object]) -> Iterator[tuple[str, str | None]]:
    """Yield each flag with its value, None for a flag without one.

    Args:
        flags: name → value. True stands for a flag without a value, None and False omit the flag; a list repeats it,
            and a mapping repeats it with NAME=VALUE.
    """
    for name, value in flags.items():
        pairs = [f"{key}={inner}" for key, inner in value.items()] if isinstance(value, Mapping) else value
        for one in pairs if isinstance(pairs, list) else [pairs]:
            if one is not None and one is not False:
                yield name, None if one is True else str(one)


def setting_flags(settings: Mapping[str, object]) -> dict[str, object]:
    """Return the flags of recipe settings by dotted name, with values as they are typed; see `parse_flag`."""
    return {
        f"--no-{name}" if value is False else f"--{name}": value is False or _typed(value)
        for name, value in settings.items()
    }


def _typed(value: object) -> object:
    if isinstance(value, list):
        return [json.dumps(one, ensure_ascii=False) if isinstance(one, dict) else one for one in value]
    return "null" if value is None else value


def free_place(wanted: Path, ending: str = "") -> Path:
    """Return a path that does not exist: the given one with an ending behind its name, and with a number if need be."""
    named = wanted if wanted.name not in ("", "..") else wanted.resolve()
    places = (named.parent / f"{named.name}{ending}{end}" for end in ("", *(f"-{number}" for number in range(2, 1000))))
    first = next(places)
    return next((place for place in (first, *places) if not os.path.lexists(place)), first)
