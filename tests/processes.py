"""Programs in processes of their own, forked where everything is imported already: importing takes seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMMAND_LINE = "from loratune.cli.app import main; main()"

# A child leaves the loop, and ends as every program does: with the interpreter's own clearing up.
NURSERY = """
import json, os, sys
import loratune.cli.data_check, loratune.cli.sft, loratune.delivery.merge.merge, loratune.engine.engine
import loratune.generation.server.running, loratune.training.run
while line := sys.stdin.readline():
    asked = json.loads(line)
    if "wait" in asked:
        print(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    for number, (path, flags) in enumerate(asked["streams"]):
        os.dup2(os.open(path, flags, 0o600), number)
    sys.argv = asked["arguments"]
    exec(asked["code"], {"__name__": "__main__"})
    break
"""


class Program:
    """A program that has been started, with what it has written so far."""

    def __init__(self, ask: Callable[..., int], pid: int, output: Path, errors: Path) -> None:
        self.pid, self._ask, self._output, self._errors = pid, ask, output, errors
        self._code: int | None = None

    @property
    def stdout(self) -> str:
        return self._output.read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return self._errors.read_text(encoding="utf-8")

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def exit_code(self) -> int:
        """Wait for the end."""
        if self._code is None:
            self._code = self._ask(wait=self.pid)
        return self._code

    def has_ended(self) -> bool:
        """Whether it is a zombie, which it stays until somebody waits for it."""
        return self._code is not None or Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    def kill(self) -> None:
        if self._code is None:
            self.send(signal.SIGKILL)
            self.exit_code()


class Nursery:
    """Where programs are forked."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def ask(self, **asked: Any) -> int:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, folder: Path, code: str, arguments: list[str]) -> Program:
        """Start a program whose output goes into files of a folder."""
        output, errors = folder / "stdout", folder / "stderr"
        output.touch()
        errors.touch()
        written = os.O_WRONLY | os.O_CREAT
        streams = [(os.devnull, os.O_RDONLY), (str(output), written), (str(errors), written)]
        pid = self.ask(
            code=code, arguments=arguments, streams=streams, environment=dict(os.environ), folder=str(Path.cwd())
        )
        return Program(self.ask, pid, output, errors)


@contextmanager
def opened_nursery() -> Iterator[Nursery]:
    """A process that imports everything once, and ends with the tests."""
    command = [sys.executable, "-c", NURSERY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Nursery(process)
        process.kill()


def comes_true(condition: Callable[[], Any], seconds: float = 120) -> bool:
    """Wait for something that takes a moment here, and many times as long on a busy machine."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True
