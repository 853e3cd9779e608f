"""The command that is running, as a line to type again with other flags."""

from __future__ import annotations

from collections.abc import Sequence, Set
from contextvars import ContextVar

from loratune.commands import Command

_TYPED: ContextVar[tuple[str, ...]] = ContextVar("typed", default=("loratune",))


def remember(path: str, arguments: Sequence[str]) -> None:
    """Keep the line of a command that begins.

    Args:
        path: of the command, such as `loratune data check`.
        arguments: what follows it.
    """
    _TYPED.set(("loratune", *path.split()[1:], *arguments))


def repeated(purpose: str, flags: Set[str]) -> Command:
    """The running command with flags added.

    Args:
        purpose: as of `Command`.
        flags: names without values; those that are given already are not given twice.
    """
    return Command(purpose, (*(word for word in _TYPED.get() if word not in flags), *sorted(flags)))
