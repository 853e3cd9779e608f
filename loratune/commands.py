"""Command lines that output advises: whole, and quoted for a shell, so that they run as they stand."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """One command line, and what it is for."""

    purpose: str
    """What it does, such as `serve it`."""
    words: tuple[str, ...]
    """As a shell splits the line."""
    chosen: Mapping[str, str] = field(default_factory=dict)
    """What the user has to put in: a word in capitals within `words` → what it stands for."""

    @property
    def line(self) -> str:
        """What to type."""
        return shlex.join(self.words)

    def __str__(self) -> str:
        told = "".join(f"  ({name}: {meaning})" for name, meaning in self.chosen.items())
        return f"{self.purpose}: {self.line}{told}"


def loratune(
    purpose: str, command: str, flags: Mapping[str, object], chosen: Mapping[str, str] | None = None
) -> Command:
    """A command of loratune's own.

    Args:
        purpose: what it does.
        command: such as `merge` or `data check`.
        flags: name → value; True stands for the flag alone, None and False leave it out.
        chosen: as of `Command`.
    """
    words = ["loratune", *command.split()]
    for name, value in flags.items():
        if value is not None and value is not False:
            words += [name] if value is True else [name, str(value)]
    return Command(purpose, tuple(words), chosen or {})


def free_place(wanted: Path) -> Path:
    """A folder's name that nothing has yet: the given one, or one made from it."""
    tried = (wanted.with_name(f"{wanted.name}{end}") for end in ("", *(f"-{number}" for number in range(2, 1000))))
    return next((place for place in tried if not place.exists() and not place.is_symlink()), wanted)
