"""Standard streams that never raise; only the loss of a result is an error."""

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
    """A stream that never fails: it escapes characters that it cannot encode, and drops what the system rejects.

    Progress, warnings and output of libraries may go to a closed terminal or a full disk during training. None of them
    should end it.
    """

    loss: Exception | None = None
    """Why output was lost since `delivered` began."""

    def write(self, text: str) -> int:
        """Write, ignoring errors of the system."""
        try:
            return super().write(text)
        except (OSError, ValueError) as error:
            self.loss = error
            return len(text)

    def flush(self) -> None:
        """Flush, ignoring errors of the system."""
        try:
            super().flush()
        except (OSError, ValueError) as error:
            self.loss = error


def make_steady() -> None:
    """Replace the standard streams with ones that never raise."""
    for number in range(3):
        _fill(number)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - a descriptor, for as long as the process runs
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = _steady(getattr(sys, name), number)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _fill(number: int) -> None:
    """Reopen a closed standard descriptor, or the next opened file would get it and receive all messages."""
    try:
        os.fstat(number)
    except OSError:
        # Read-only, so that writing fails as on a closed stream. The system assigns the lowest free number.
        os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)


def _steady(stream: Any, number: int) -> Any:
    if stream is None:
        stream = open(number, "w", closefd=False)  # noqa: SIM115
    if not isinstance(stream, io.TextIOWrapper):  # replaced by others, such as a notebook
        return stream
    settings: dict[str, Any] = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
    encoding = stream.encoding
    with suppress(OSError):
        stream.flush()
    return SteadyStream(stream.detach(), encoding=encoding, errors=ESCAPED, **settings)


@contextmanager
def delivered() -> Iterator[None]:
    """Check that everything written to stdout in the `with` block arrives.

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
