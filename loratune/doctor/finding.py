"""A line of the examination: how a part of the machine is, and the commands that mend it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from loratune.commands import Command
from loratune.errors import Exit
from loratune.extras import pip_install

State: TypeAlias = Literal["fine", "slower", "broken"]


@dataclass(frozen=True)
class Finding:
    """How one part of the machine is."""

    name: str
    state: State
    text: str
    remedies: tuple[Command, ...] = ()
    """Commands that mend it, the most likely one first."""
    exit_code: Exit = Exit.OK
    """Exit code of the command if this is broken."""


@dataclass(frozen=True)
class Group:
    """Findings about one subject."""

    title: str
    findings: tuple[Finding, ...]


def fine(name: str, text: str) -> Finding:
    return Finding(name, "fine", text)


def slower(name: str, text: str, *remedies: Command) -> Finding:
    """Return a finding of what works, but not as fast as this machine could."""
    return Finding(name, "slower", text, remedies)


def broken(name: str, text: str, *remedies: Command, exit_code: Exit = Exit.IO) -> Finding:
    return Finding(name, "broken", text, remedies, exit_code)


def shell(purpose: str, line: str, **chosen: str) -> Command:
    """Return a command of another program.

    Args:
        purpose: see `Command`.
        line: the words, separated by blanks.
        chosen: see `Command`.
    """
    return Command(purpose, tuple(line.split()), chosen)


def installing(purpose: str, line: str) -> Command:
    """Return a command that installs packages; `line` has options and packages, separated by blanks."""
    return shell(purpose, pip_install(line))
