"""Renders with an unknown chat template first in a forked process with limited time and memory.

A template is a program by the model's author. Jinja's sandbox blocks files and Python, and limits one range, but
neither nested ranges nor repeated doubling of a text.
"""

from __future__ import annotations

import os
import select
import signal
import warnings
from collections.abc import Callable, Iterable

import psutil

from loratune import console
from loratune.errors import Exit, LoratuneError

CPU_SECONDS = 3
"""Templates usually take a few milliseconds for all trial conversations, compilation included."""
WAIT_SECONDS = 60.0
"""Allows for a machine under load."""
MEMORY_BYTES = 500_000_000
CHARACTERS = 30_000
"""Limit for a prompt of a few words; tool descriptions and reasoning take a few thousand characters.

Model comparisons run on such prompts, and ten times as many tokens would take minutes.
"""
_FINE, _TOO_LARGE = b"f", b"l"
_tried: set[str] = set()


def try_template(text: str, renderings: Iterable[Callable[[], str]]) -> None:
    """Render with a template that is new to this process, and wait for the result.

    Args:
        text: the template's text.
        renderings: each renders a short conversation; their exceptions are ignored here and recur in the real
            rendering.

    Raises:
        LoratuneError: rendering exceeded the time, memory or length limit.
    """
    if text in _tried or not hasattr(os, "fork"):
        return
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # The warning is about locks of other threads, which stay taken in the child; rendering uses none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _render_within_limits(writing, renderings)
    os.close(writing)
    try:
        is_done, _, _ = select.select([reading], [], [], WAIT_SECONDS)
        verdict = os.read(reading, 1) if is_done else b""
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)  # harmless if it has already exited
        os.waitpid(child, 0)
    if verdict != _FINE:
        cause = f"writes more than {CHARACTERS:,} characters" if verdict == _TOO_LARGE else "does not come to an end"
        raise LoratuneError(
            f"the tokenizer's chat template {cause} for a conversation of a few words ({CPU_SECONDS} s and "
            f"{console.memory(MEMORY_BYTES)} are allowed); fetch the model's files again, correct the template, or set "
            "prompt.template to plain or alpaca",
            Exit.MODEL,
        )
    _tried.add(text)


def _render_within_limits(writing: int, renderings: Iterable[Callable[[], str]]) -> None:
    """Run in the child process, and exit without the interpreter's cleanup."""
    verdict = b""
    try:
        _set_limits()
        verdict = _FINE if all(_length(render) <= CHARACTERS for render in renderings) else _TOO_LARGE
    finally:
        os.write(writing, verdict)
        os._exit(0)


def _length(render: Callable[[], str]) -> int:
    try:
        return len(render())
    except MemoryError:
        return CHARACTERS + 1
    except Exception:  # templates raise anything to reject messages
        return 0


def _set_limits() -> None:
    import resource  # noqa: PLC0415 - not on every system that Python runs on, but where there is fork

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    memory = psutil.Process().memory_info().vms + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
