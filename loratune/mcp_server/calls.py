"""Runs commands of loratune as processes, with --json and without a network."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratune.commands import flag_values, setting_flags
from loratune.errors import Exit, LoratuneError
from loratune.mcp_server.arguments import refused_settings, setting_problems
from loratune.runtime import program

Document = dict[str, Any]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
LOG_TAIL = 2000
"""Characters of a log that are told of a process that has printed no document."""
TELL: ContextVar[Callable[[str], Awaitable[None]] | None] = ContextVar("tell", default=None)
"""Tells the client of the present call a line of its command's messages."""


@dataclass
class Calls:
    """Runs command lines in a folder."""

    folder: Path
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """Trainings; asked now and then whether they have ended, so that none stays a zombie."""

    async def run(self, *words: str) -> Document:
        """Return the document that a command prints; if the caller gives up, the command gets SIGTERM.

        Args:
            words: of the command line, without --json.

        Raises:
            LoratuneError: no process can be given the words, or it has printed no document.
        """
        with _limits_explained():
            process = await asyncio.create_subprocess_exec(
                *self._line(words),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=self.folder,
                env=self._environment(),
            )
        try:
            assert process.stdout
            assert process.stderr
            output, log = await asyncio.gather(process.stdout.read(), _told(process.stderr))
            await process.wait()
        except BaseException:  # its caller gives up, or has gone, so that it cannot be told how far the command is
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            raise
        return _read(output, log.decode(errors="replace"))

    def start(self, words: Sequence[str], output: Path, log: Path) -> subprocess.Popen[bytes]:
        """Start a command apart from the server's process group, so that it goes on when the server ends.

        Args:
            words: of the command line, without --json.
            output: file for its document.
            log: file for its messages.
        """
        for one in self._started:
            one.poll()
        with _limits_explained(), output.open("wb") as document, log.open("wb") as messages:
            process = subprocess.Popen(
                self._line(words),
                stdin=subprocess.DEVNULL,
                stdout=document,
                stderr=messages,
                cwd=self.folder,
                env=self._environment(),
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def _line(self, words: Sequence[str]) -> list[str]:
        return [*program("loratune"), *words, "--json"]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **OFFLINE}


async def _told(messages: asyncio.StreamReader) -> bytes:
    """Return all messages of a command; each line is told as soon as it is there, up to an error, which is a result."""
    tell, log, line = TELL.get(), bytearray(), b""
    while part := await messages.read(2**16):
        log += part
        *lines, line = (line + part).split(b"\n")
        for text in (one.decode(errors="replace").strip() for one in lines):
            tell = None if text.startswith("error: ") else tell
            if tell and text:
                await tell(text)
    return bytes(log)


@contextmanager
def _limits_explained() -> Iterator[None]:
    """Turn the system's refusal of a process's words into a message for who gave them."""
    try:
        yield
    except ValueError as error:
        raise LoratuneError(
            f"an argument holds a character that no process can be given: {error}", Exit.USAGE
        ) from error
    except OSError as error:
        if error.errno != errno.E2BIG:
            raise
        raise LoratuneError(
            "an argument is longer than a process can be given; shorten it, or give long texts as rows in a file",
            Exit.USAGE,
        ) from error


def read_document(output: Path, log: Path) -> Document:
    """Return the document that a started command has printed."""
    return _read(output.read_bytes(), log.read_text(encoding="utf-8", errors="replace"))


def _read(output: bytes, log: str) -> Document:
    """Return a document.

    Raises:
        LoratuneError: there is none, because the process was killed; with the end of its messages.
    """
    try:
        document = json.loads(output)
        assert isinstance(document, dict)
    except (ValueError, AssertionError) as error:
        raise LoratuneError(f"the command ended without a result:\n{log[-LOG_TAIL:]}", Exit.BUG) from error
    return document


def flags(values: Mapping[str, Any]) -> list[str]:
    """Return the words of flags; see `flag_values`. A value is never a word, so it cannot become a flag of its own."""
    return [name if value is None else f"{name}={value}" for name, value in flag_values(values)]


def setting_words(settings: Mapping[str, Any]) -> list[str]:
    """Return the words of recipe settings, by dotted name.

    Raises:
        LoratuneError: a name is that of no setting.
    """
    if problems := setting_problems(settings):
        raise refused_settings(problems)
    return flags(setting_flags(settings))
