"""Turns what ends a command into a message, an exit code and, with --json, a document."""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import typer

from loratune import console
from loratune.cli.documents import Document, is_awaited
from loratune.commands import Command, CommandLine
from loratune.errors import Exit, LoratuneError, Problem

DEBUG = "LORATUNE_DEBUG"
NUMBER = r"(?::|,? line )(?P<at>\d+)(?::\d+)?|,? row (?P<row>\d+)"
PLACE = re.compile(rf"(?:line (?P<line>\d+)|(?P<key>--[\w.-]+)|(?P<file>.+?)(?:{NUMBER})?): ")
"""Where a line of a message begins with a place: `line 3: `, `--flag: `, `rows.jsonl:3: `, `rows.parquet row 3: `."""


@dataclass(frozen=True)
class Failure:
    """Why a command has failed."""

    exit_code: int
    """1 for a bug, 128 + signal after a signal; see the exit codes."""
    message: str
    """What is wrong, where, and what to do; may have several lines."""
    problems: tuple[Problem, ...]
    """What the message lists, or the message itself."""
    commands: tuple[CommandLine, ...] = ()
    """Commands that help, in order."""


DOCUMENT = Document("error", 1, lambda: Failure)


@contextmanager
def failures_told() -> Iterator[None]:
    """End the command with a message and an exit code if the `with` block fails; bugs keep their traceback.

    Raises:
        typer.Exit: with the exit code of a failure.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, (typer.Exit, typer.Abort)):
            raise
        failure, is_for_user = _failure_of(error)
        if is_awaited():
            DOCUMENT.write(asdict(failure))
        if not is_for_user or (os.environ.get(DEBUG) and isinstance(error, Exception)):
            raise
        show = console.error if isinstance(error, Exception) else console.say  # a signal is intended
        show(failure.message)
        for advised in getattr(error, "commands", ()):
            console.next_step(advised, indent="  ")
        raise typer.Exit(failure.exit_code) from error


def document_of(error: Exception) -> dict[str, Any]:
    """Return the document of an error that is told in another way than by the end of a command."""
    return DOCUMENT.of(asdict(_failure_of(error)[0]))


def _failure_of(error: BaseException) -> tuple[Failure, bool]:
    """Return what is told of an exception, and whether it is told here: Typer does so itself, and Python of bugs."""
    if isinstance(error, KeyboardInterrupt):
        code = 128 + getattr(error, "signal_number", signal.SIGINT)
        commands = getattr(error, "commands", ())
        return _failure(getattr(error, "message", "interrupted"), code, commands=commands), True
    if isinstance(error, LoratuneError):
        return _failure(error.message, error.exit_code, error.problems, error.commands, error.parts), True
    if isinstance(error, (OSError, MemoryError)):
        return _failure(_system_message(error), Exit.IO), True
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # Click's; newer Typers have one of their own
        return _usage_failure(error), False
    assert isinstance(error, Exception)
    if _ran_out_of_memory(error):
        return _failure(
            f"out of memory: {str(error).splitlines()[0]}\n"
            "free some, or make the model smaller: --model.quantization nf4, or a smaller base",
            Exit.IO,
        ), True
    if library := _loaded_library(error):
        return _failure(
            f"{library} cannot be loaded: {type(error).__name__}: {error}\n"
            "one of its environment variables may be wrong, or its installation damaged; --debug shows where",
            Exit.IO,
        ), True
    remedy = "this is a bug of loratune; report it with the traceback on stderr"
    message = f"{type(error).__name__}: {error}"
    return Failure(int(Exit.BUG), message, (Problem(message, remedy=remedy),)), False


def _failure(
    message: str,
    code: int,
    problems: Sequence[Problem] = (),
    commands: Sequence[Command] = (),
    parts: Sequence[str] = (),
) -> Failure:
    """Return a failure with the problems that are given, or else with those that each part of its message lists."""
    told = [replace(one, remedy=one.remedy or _remedy(one.message)) for one in problems]
    listed = told or [one for part in parts or [message] for one in problems_of(part)]
    return Failure(int(code), message, tuple(listed), tuple(command.told for command in commands))


def _usage_failure(error: Any) -> Failure:
    """Return a failure of the command line itself."""
    path = error.ctx.command_path if getattr(error, "ctx", None) else "loratune"
    parameter = getattr(error, "param", None)
    names = sorted(getattr(parameter, "opts", ()), key=len)
    key = names[-1] if names else getattr(error, "option_name", None) or getattr(error, "param_hint", None)
    message = error.format_message()
    problem = Problem(message, key=key, remedy=f"{path} --help lists the options and what they take")
    return Failure(int(error.exit_code), message, (problem,))


def problems_of(message: str) -> tuple[Problem, ...]:
    """Return the problems that a message lists: its indented lines, or else the message itself.

    What to do stands behind the list, or else behind the message's last line break or semicolon.
    """
    lines = message.splitlines()
    listed = [line.strip() for line in lines if line.startswith("  ") and not line.startswith("  … and ")]
    after = lines[-1] if len(lines) > 1 and not lines[-1].startswith("  ") else None
    if not listed:
        return (replace(_placed(message), remedy=after or _remedy(message)),)
    file = _placed(f"{lines[0]} ").file
    found = (replace(_placed(line), remedy=after) for line in listed)
    return tuple(replace(one, file=file) if one.file is None and one.key is None else one for one in found)


def _placed(text: str) -> Problem:
    """Take a problem's place from its beginning; a file is one only if it exists, or is said not to."""
    match = PLACE.match(text)
    rest = text[match.end() :] if match else text
    if match is None or (match["file"] and not (os.path.lexists(match["file"]) or rest.startswith("no such f"))):
        first = text.partition(" ")[0]
        return Problem(text, file=first if "/" in first and os.path.lexists(first) else None)
    line = match["line"] or match["at"]
    return Problem(
        rest,
        file=match["file"],
        line=int(line) if line else None,
        row=int(match["row"]) if match["row"] else None,
        key=match["key"],
    )


def _remedy(text: str) -> str | None:
    """Return what one line asks for: what follows its last semicolon, or what precedes the value that was given."""
    head, _, tail = text.rpartition("; ")
    if head and tail.startswith("got "):
        return head
    return tail if head or tail.startswith(("must ", "give ")) else None


def _system_message(error: OSError | MemoryError) -> str:
    """Return the message of an error of the operating system, which never counts as a bug."""
    if isinstance(error, MemoryError):
        return f"out of memory: {str(error) or 'the system has no more'}"
    place = f"{error.filename}: " if error.filename is not None else ""
    return f"{place}{error.strerror or error}; --debug shows where it occurred"


def _ran_out_of_memory(error: Exception) -> bool:
    """Return whether torch ran out of memory; without importing torch for other errors."""
    if "torch" not in sys.modules:
        return False
    from loratune.model.memory import is_out_of_memory

    return is_out_of_memory(error)


def _loaded_library(error: Exception) -> str | None:
    """Return the library whose import raised an error; None for other errors."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>"]
    names = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame in frames]
    return next((name for name in reversed(names) if name != __name__.partition(".")[0]), None)
