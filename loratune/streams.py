"""The program's standard streams: what nobody takes any more ends nothing, but a lost result is told."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from loratune.errors import OutputLost

ESCAPED = "backslashreplace"


class SteadyStream(io.TextIOWrapper):
    """A stream that takes everything: it escapes what it cannot show, and drops what the system refuses.

    Progress, warnings and whatever a library prints go to a terminal that may be closed, or to a disk that may be
    full, in the middle of a training. None of them is worth its end.
    """

    loss: Exception | None = None
    """Why something that was written since `delivered` began has got lost."""

    def write(self, text: str) -> int:
        """Write as far as the system lets it."""
        try:
            return super().write(text)
        except (OSError, ValueError) as error:
            self.loss = error
            return len(text)

    def flush(self) -> None:
        """Hand over as far as the system lets it."""
        try:
            super().flush()
        except (OSError, ValueError) as error:
            self.loss = error


def make_steady() -> None:
    """Let the standard streams of this process outlive their readers."""
    for number in range(3):
        _fill(number)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - a descriptor, for as long as the process runs
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = _steady(getattr(sys, name), number)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _fill(number: int) -> None:
    """Give a closed standard stream its number back, or the next file would get it, and every message with it."""
    try:
        os.fstat(number)
    except OSError:
        # Not to be written to, so that writing fails as on a closed one. The system gives the lowest free number.
        os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)


def _steady(stream: Any, number: int) -> Any:
    if stream is None:
        stream = open(number, "w", closefd=False)  # noqa: SIM115
    if not isinstance(stream, io.TextIOWrapper):  # somebody else's, such as a notebook's
        return stream
    settings: dict[str, Any] = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
    encoding = stream.encoding
    with suppress(OSError):
        stream.flush()
    return SteadyStream(stream.detach(), encoding=encoding, errors=ESCAPED, **settings)


@contextmanager
def delivered() -> Iterator[None]:
    """While a result is written to stdout.

    Raises:
        OutputLost: it could not be written.
    """
    stream = sys.stdout
    if isinstance(stream, SteadyStream):
        stream.loss = None
    yield
    stream.flush()
    if isinstance(stream, SteadyStream) and stream.loss is not None:
        raise OutputLost(stream.loss)
