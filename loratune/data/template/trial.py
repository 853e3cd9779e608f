"""A chat template's first rendering: in a process of its own that has little time and memory.

A template is a program of whoever made the model. Jinja's sandbox keeps it from files and from Python, and bounds one
range, but not two of them inside each other, nor a text that is doubled forty times.
"""

from __future__ import annotations

import os
import select
import signal
import warnings
from collections.abc import Callable, Iterable

import psutil

from loratune.errors import Exit, LoratuneError

CPU_SECONDS = 3
"""The usual templates take some milliseconds for all conversations of a trial, compiling included."""
WAIT_SECONDS = 60.0
"""On a machine that is busy with other things."""
MEMORY_BYTES = 500_000_000
CHARACTERS = 30_000
"""Of a prompt of a few words; descriptions of tools and reasoning take some thousands. Models that are compared run on
such prompts, and ten times as many tokens would keep a machine busy for minutes."""
_FINE, _TOO_LARGE = b"f", b"l"
_tried: set[str] = set()


def try_template(text: str, renderings: Iterable[Callable[[], str]]) -> None:
    """Render with a template that is new to this process, and wait until it is done or has used up what it has.

    Args:
        text: of the template.
        renderings: each makes a prompt of a short conversation; what they raise is left to those who render next.

    Raises:
        LoratuneError: it took too long, or made too much.
    """
    if text in _tried or not hasattr(os, "fork"):
        return
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Of other threads, whose locks stay taken in the new process; rendering takes none of theirs.
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
        os.kill(child, signal.SIGKILL)  # which is harmless to one that has ended and is not waited for yet
        os.waitpid(child, 0)
    if verdict != _FINE:
        cause = f"writes more than {CHARACTERS:,} characters" if verdict == _TOO_LARGE else "does not come to an end"
        raise LoratuneError(
            f"the tokenizer's chat template {cause} for a conversation of a few words ({CPU_SECONDS} s and "
            f"{MEMORY_BYTES // 1_000_000} MB are allowed); fetch the model's files again, correct the template, or set "
            "prompt.template to plain or alpaca",
            Exit.MODEL,
        )
    _tried.add(text)


def _render_within_limits(writing: int, renderings: Iterable[Callable[[], str]]) -> None:
    """What the new process does; it ends here, without anything that a program does at its end."""
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
    except Exception:  # a template may refuse messages in any way
        return 0


def _set_limits() -> None:
    import resource  # noqa: PLC0415 - not on every system that Python runs on, but where there is fork

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    memory = psutil.Process().memory_info().vms + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
