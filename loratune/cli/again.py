"""Remembers the running command line, so that messages can suggest it with other flags."""

from __future__ import annotations

from collections.abc import Sequence, Set
from contextvars import ContextVar

from loratune.commands import Command

_TYPED: ContextVar[tuple[str, ...]] = ContextVar("typed", default=("loratune",))


def remember(path: str, arguments: Sequence[str]) -> None:
    """Store the command line of the command that starts.

    Args:
        path: path of the command, such as `loratune data check`.
        arguments: the arguments after it.
    """
    _TYPED.set(("loratune", *path.split()[1:], *arguments))


def repeated(purpose: str, flags: Set[str]) -> Command:
    """Return the running command with flags added.

    Args:
        purpose: see `Command`.
        flags: flags without values; flags that are already given are not repeated.
    """
    return Command(purpose, (*(word for word in _TYPED.get() if word not in flags), *sorted(flags)))
