"""The one exception for what a user can fix, and the exit code that goes with each kind."""

import errno
from collections.abc import Callable, Sequence
from enum import IntEnum

from loratune.commands import Command


class Exit(IntEnum):
    """Process exit codes; 128 + signal number stands for an interrupted run."""

    OK = 0
    BUG = 1
    USAGE = 2
    DATA = 3
    MODEL = 4
    DIVERGED = 5
    IO = 6


class LoratuneError(Exception):
    """A failure that the user can fix: the message says what, where, and what to do.

    Args:
        message: without the commands.
        exit_code: of the process.
        commands: that help, in their order. Whoever advises one has asked its own checks first, as `refusal` does.
    """

    def __init__(self, message: str, exit_code: Exit, commands: Sequence[Command] = ()) -> None:
        super().__init__("\n".join([message, *(f"  {command}" for command in commands)]))
        self.message = message
        self.exit_code = exit_code
        self.commands = tuple(commands)


class Interrupted(KeyboardInterrupt):
    """A signal has ended the command.

    Args:
        signal_number: that came.
        message: where things stand, and how to go on.
    """

    def __init__(self, signal_number: int, message: str = "interrupted") -> None:
        super().__init__(message)
        self.signal_number = signal_number


class OutputLost(BaseException):
    """A result could not be written to stdout; as a KeyboardInterrupt, it ends whatever goes on.

    Args:
        reason: what the system has said.
    """

    def __init__(self, reason: Exception) -> None:
        is_closed = getattr(reason, "errno", None) == errno.EBADF
        super().__init__("it is closed" if is_closed else getattr(reason, "strerror", None) or str(reason))
        self.has_no_reader = isinstance(reason, BrokenPipeError)
        """Whether a program in a pipe has read enough, as `head` does."""


def refusal(check: Callable[[], object]) -> LoratuneError | None:
    """What a check refuses with; None if it lets pass."""
    try:
        check()
    except LoratuneError as error:
        return error
    return None


def reason_of(error: BaseException, limit: int = 300) -> str:
    """What a library's exception says, as the end of a line of ours: its text on one line, or else its class."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def first_line_of(error: BaseException, limit: int = 300) -> str:
    """The same of a library that goes on with advice of its own, which would not help here."""
    return next((line.strip()[:limit] for line in str(error).splitlines() if line.strip()), type(error).__name__)


def named_reason_of(error: BaseException) -> str:
    """The same behind its class, which says most where a hub's client fails."""
    return f"{type(error).__name__}: {first_line_of(error) if str(error).strip() else 'no reason given'}"


def counted(count: int, noun: str) -> str:
    """A number with its noun: 1 row, 2,000 rows."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def bullet_list(problems: list[str], limit: int = 20, total: int | None = None) -> str:
    """One indented line per problem; past `limit` only the count of the rest, of `total` where not all are given."""
    lines = [f"  {problem}" for problem in problems[:limit]]
    rest = (len(problems) if total is None else total) - len(lines)
    if rest > 0:
        lines.append(f"  … and {rest} more")
    return "\n".join(lines)
