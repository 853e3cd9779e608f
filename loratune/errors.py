"""The exception for errors that users can fix, and the exit codes."""

import errno
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from loratune.commands import Command


class Exit(IntEnum):
    """Exit codes of the process; 128 + signal number after a signal."""

    OK = 0
    BUG = 1
    USAGE = 2
    DATA = 3
    MODEL = 4
    DIVERGED = 5
    IO = 6
    WORSE = 7
    PEER = 8


MEANINGS = {
    Exit.OK: "done",
    Exit.BUG: "a bug of loratune",
    Exit.USAGE: "the command line or the recipe",
    Exit.DATA: "rows",
    Exit.MODEL: "a model, an adapter, a checkpoint, or a proof that failed",
    Exit.DIVERGED: "the training diverged",
    Exit.IO: "disk, memory, permission, or software of the machine",
    Exit.WORSE: "an evaluation that came out worse",
    Exit.PEER: "another process of the run was lost",
}
"""Exit code → what is at fault."""


@dataclass(frozen=True)
class Problem:
    """One of the things that are wrong, and where."""

    message: str
    """What is wrong, without the place."""
    file: str | None = None
    line: int | None = None
    """Counted from 1."""
    row: int | None = None
    """Of a file without lines; counted from 1."""
    key: str | None = None
    """A recipe's setting, or a flag with its dashes."""
    remedy: str | None = None
    """What to do, where that is apart from the message."""


SINGULAR = {"are": "is", "have": "has", "hold": "holds", "equal": "equals", "differ": "differs", "stay": "stays"}
"""Verb in the plural → in the singular; all others that are used have one form, such as `cannot`."""

HUB_ERRORS = {
    "OfflineModeIsEnabled": "it is not on this machine, and HF_HUB_OFFLINE is set",
    "GatedRepoError": "it is gated: ask for access on its page at the hub, and log in with `hf auth login`",
    "RepositoryNotFoundError": "the hub has none of this name, or it is private and needs `hf auth login`",
    "RevisionNotFoundError": "it has no such revision",
    **dict.fromkeys(("ConnectTimeout", "ReadTimeout", "TimeoutError"), "the hub does not answer in time"),
    **dict.fromkeys(("ConnectError", "ConnectionError"), "no connection ({reason})"),
    "HfHubHTTPError": "{reason}",
}
"""Class of a hub's client or its HTTP library → what it means; the first that is found counts."""

SHOWN_MESSAGES = 10
"""Of several messages in one error."""


class LoratuneError(Exception):
    """An error that the user can fix; the message says what is wrong, where, and what to do.

    Args:
        message: the message without commands.
        exit_code: exit code of the process.
        commands: commands that help, in order; the caller has verified that they will be accepted (see `refusal`).
        problems: what the message lists, for programs; default is to take them from its lines.
        parts: messages that are joined in this one; each lists problems of its own, and what to do about them.
    """

    def __init__(
        self,
        message: str,
        exit_code: Exit,
        commands: Sequence[Command] = (),
        problems: Sequence[Problem] = (),
        parts: Sequence[str] = (),
    ) -> None:
        super().__init__("\n".join([message, *(f"  {command}" for command in commands)]))
        self.message = message
        self.exit_code = exit_code
        self.commands = tuple(commands)
        self.problems = tuple(problems)
        self.parts = tuple(parts) or (message,)


class Interrupted(KeyboardInterrupt):
    """A signal ended the command.

    Args:
        signal_number: number of the signal.
        message: the state of the work.
        commands: how to continue.
    """

    def __init__(self, signal_number: int, message: str = "interrupted", commands: Sequence[Command] = ()) -> None:
        super().__init__("\n".join([message, *(f"  {command}" for command in commands)]))
        self.signal_number = signal_number
        self.message = message
        self.commands = tuple(commands)


class Paused(Interrupted):
    """A run has stopped itself, as a signal would, since it has done its share of the steps."""


class OutputLost(BaseException):
    """A result could not be written to stdout. Like KeyboardInterrupt, it is not an Exception, so it ends the program.

    Args:
        reason: the system's error.
    """

    def __init__(self, reason: Exception) -> None:
        is_closed = getattr(reason, "errno", None) == errno.EBADF
        super().__init__("it is closed" if is_closed else getattr(reason, "strerror", None) or str(reason))
        self.has_no_reader = isinstance(reason, BrokenPipeError)
        """Whether the reader of a pipe has closed it, as `head` does."""


def joined(
    messages: Sequence[str], exit_code: Exit, commands: Sequence[Command] = (), others: Sequence[str] = ()
) -> LoratuneError:
    """Return one error with several messages.

    Args:
        messages: of which the first are shown, and the others are counted and only in documents.
        exit_code: exit code of the process.
        commands: commands that help.
        others: messages that are all shown, last.
    """
    hidden = len(messages) - SHOWN_MESSAGES
    rest = [f"… and {counted(hidden, 'more problem')}, which the JSON document lists"] if hidden > 0 else []
    shown = "\n".join([*messages[:SHOWN_MESSAGES], *rest, *others])
    return LoratuneError(shown, exit_code, commands, parts=[*messages, *others])


def together(errors: Sequence[LoratuneError]) -> LoratuneError:
    """Return one error with the messages of several, at least one; its exit code is the greatest."""
    if len(errors) == 1:
        return errors[0]
    return LoratuneError(
        "\n".join(error.message for error in errors),
        max(error.exit_code for error in errors),
        [command for error in errors for command in error.commands],
        parts=[part for error in errors for part in error.parts],
    )


def refusal(check: Callable[[], object]) -> LoratuneError | None:
    """Return the error that a check raises; None if it passes."""
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


def hub_reason_of(error: BaseException) -> str:
    """The same of a hub's client, in words for what its classes stand for; a traceback names them."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    names = {kind.__name__ for one in chain for kind in type(one).__mro__} | {*re.findall(r"\w+", str(error))}
    known = next((words for name, words in HUB_ERRORS.items() if name in names), None)
    if known is None:
        return named_reason_of(error)
    of_system = [one.strerror for one in chain if isinstance(one, OSError) and one.errno and one.strerror]
    return known.format(reason=of_system[-1] if of_system else re.sub(r" \(\w+\)$", "", first_line_of(error)))


def counted(count: float, noun: str) -> str:
    """Format a number with its noun, which may have an "of" behind it: 1 row, 2,000 rows of a file, 0.5 epochs."""
    head, of, rest = noun.partition(" of ")
    return f"{count:{'g' if isinstance(count, float) else ','}} {head}{'' if count == 1 else 's'}{of}{rest}"


def agreeing(count: int, predicate: str) -> str:
    """Return what is said of so many things, from its plural: "is short" for 1, and else "are short"."""
    verb, *rest = predicate.split(" ", 1)
    return " ".join([SINGULAR.get(verb, verb), *rest]) if count == 1 else predicate


def bullet_list(problems: list[str], limit: int = 20, total: int | None = None) -> str:
    """Return one indented line per problem, and the number of omitted ones beyond `limit`.

    `total` is the number of all problems, if not all are given.
    """
    lines = [f"  {problem}" for problem in problems[:limit]]
    rest = (len(problems) if total is None else total) - len(lines)
    if rest > 0:
        lines.append(f"  … and {rest} more")
    return "\n".join(lines)
