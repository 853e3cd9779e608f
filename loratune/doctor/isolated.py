"""Measures something in a process of its own: what crashes or hangs there becomes a `Failure` here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TypeVar

from pydantic import TypeAdapter

from loratune.doctor.facts import Failure
from loratune.runtime import program

Facts = TypeVar("Facts")
SHOWN_CHARACTERS = 300
ENDING_SECONDS = 5.0
"""How long a killed process may take to end. One that waits for a disk that does not answer never does."""


def measured(
    kind: type[Facts],
    probe: str,
    arguments: Mapping[str, Any],
    seconds: float,
    environment: Mapping[str, str] | None = None,
) -> Facts | Failure:
    """Return what a probe has measured, or why it has measured nothing.

    Args:
        kind: type of the facts.
        probe: its name, see `child.run`.
        arguments: the probe's arguments, as JSON has them.
        seconds: time limit of the process.
        environment: variables that the process gets in addition.
    """
    process = subprocess.Popen(
        [*program("loratune.doctor.child"), probe],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **(environment or {})},
        start_new_session=True,  # so that its own processes can be killed with it
    )
    try:
        output, errors = process.communicate(json.dumps(arguments).encode(), seconds)
    except subprocess.TimeoutExpired:
        return Failure("timeout", f"no answer after {seconds:.0f} s")
    finally:
        _end(process)
    try:
        return _read(kind, output)
    except ValueError:
        return _crashed(process.returncode, errors.decode(errors="replace"))


def _read(kind: type[Facts], output: bytes) -> Facts | Failure:
    """Return facts or the failure that the process has written.

    Raises:
        ValueError: it has written neither.
    """
    values = json.loads(output)
    return TypeAdapter(Failure if "failure" in values else kind).validate_python(next(iter(values.values())))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with all that it has started."""
    if process.returncode is None:  # once it is waited for, its number may be another's
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(ENDING_SECONDS)
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe:
            with suppress(OSError):
                pipe.close()


def _crashed(code: int, errors: str) -> Failure:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    last = f": {lines[-1][:SHOWN_CHARACTERS]}" if lines else ""
    if code < 0:
        name = signal.Signals(-code).name if -code in {*signal.Signals} else f"signal {-code}"
        return Failure("signal", f"the process crashed with {name}")
    return Failure("error", f"the process ended with {code}{last}")
