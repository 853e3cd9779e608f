"""Progress on stderr: bars on a terminal, and lines now and then where there is none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from loratune import console
from loratune.console import duration, memory, say
from loratune.printable import printable

FIRST_LINE_SECONDS, LINE_SECONDS = 5, 15
"""Without a terminal: time before the first line of a progress, and the least between two of them."""
MOST_LINES = 40
"""Of a progress without a terminal, if it goes on as fast as it began."""


@contextmanager
def byte_progress(message: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show a bar; yields a function to call with each number of processed bytes. One line without a terminal."""
    columns = (BarColumn(bar_width=None), _Bytes(), TimeElapsedColumn())
    with _advancing(message, total_bytes, _plain("description"), *columns) as advance:
        yield advance


def _plain(of: str) -> TextColumn:
    """Return a column with a text of the task as it is: names of files may hold brackets and braces."""
    return TextColumn(f"{{task.{of}}}", markup=False)


def _times() -> tuple[ProgressColumn, ...]:
    """Return the columns of the time so far, and of the time that is left."""
    return TimeElapsedColumn(), TextColumn("·"), TimeRemainingColumn(), TextColumn("left")


class _Bytes(ProgressColumn):
    """How much of how much."""

    def render(self, task: Task) -> Text:
        return Text(f"{memory(task.completed)} of {memory(task.total or 0)}", style="progress.download")


@contextmanager
def row_progress(message: str) -> Iterator[Callable[[int], None]]:
    """Show a count of rows; yields a function to call with each number of new rows. One line without a terminal."""
    columns = (SpinnerColumn(), _plain("description"), TextColumn("{task.completed:,} rows"), TimeElapsedColumn())
    with _advancing(message, None, *columns) as advance:
        yield advance


@contextmanager
def _advancing(message: str, total: int | None, *columns: ProgressColumn) -> Iterator[Callable[[int], None]]:
    if not console.stderr.is_terminal:
        say(message)
        yield lambda _: None
        return
    with Progress(*columns, console=console.stderr, expand=total is not None, transient=True) as progress:
        task = progress.add_task(printable(message), total=total)
        yield lambda count: progress.advance(task, count)


class Tell(Protocol):
    """Shows a count."""

    def __call__(self, count: int, figures: str, begun: float = 0.0) -> None:
        """Show it.

        Args:
            count: how many are finished.
            figures: shown beside it.
            begun: how many the unfinished ones amount to, where many are made at once.
        """


@contextmanager
def counted_progress(noun: str, total: int, done: int = 0) -> Iterator[Tell]:
    """Show a bar with the remaining time, and yield how to tell the count.

    Without a terminal it prints lines with the remaining time, at growing intervals and only of a new count.
    """
    if not console.stderr.is_terminal:
        yield _telling_now_and_then(noun, total, done)
        return
    columns = (
        *(SpinnerColumn(), TextColumn(f"{{task.completed:,}}/{total:,} {noun}"), BarColumn(bar_width=None)),
        *(_plain("fields[figures]"), *_times()),
    )
    with Progress(*columns, console=console.stderr, expand=True, transient=True) as progress:
        task = progress.add_task(noun, total=total, completed=done, figures="")

        def tell(count: int, figures: str, begun: float = 0.0) -> None:
            progress.update(task, completed=count, figures=figures)

        yield tell


def _telling_now_and_then(noun: str, total: int, done: int) -> Tell:
    start = printed_at = time.monotonic()
    printed: int | None = None

    def tell(count: int, figures: str, begun: float = 0.0) -> None:
        nonlocal printed_at, printed
        if count == printed:
            return
        now = time.monotonic()
        made = count - done + begun
        # Less than one says nothing of the rest: the first moments are those of prompts, or of a kernel's compilation.
        left = (now - start) * max(0.0, total - done - made) / made if made >= 1 else 0.0
        pause = FIRST_LINE_SECONDS if printed is None else max(LINE_SECONDS, (now - start + left) / MOST_LINES)
        if count == total or now - printed_at >= pause:
            printed_at, printed = now, count
            parts = (f"{count:,}/{total:,} {noun}", figures, f"{duration(left)} left" if left else "")
            say("  ".join(filter(None, parts)))

    return tell


class StepProgress:
    """The training progress bar with a line of metrics; plain lines without a terminal."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self._lines_every = max(1, total_steps // 20)
        self._last_line = self._last_validation = 0
        self._has_room = False
        columns = (SpinnerColumn(), TextColumn("step {task.completed}/{task.total}"), BarColumn(bar_width=None))
        self._progress = Progress(*columns, *_times(), console=console.stderr, expand=True)
        self._task = self._progress.add_task("training", total=total_steps)
        self._figures = Text("  waiting for the first step", style="dim")
        self._live = Live(Group(self._progress, self._figures), console=console.stderr, refresh_per_second=4)

    def start(self) -> None:
        if console.stderr.is_terminal:
            self._live.start()

    def update(self, step: int, figures: str, validation: str = "", validated: int = 0) -> None:
        """Show a step, or the validation that follows it; one gets a line of its own behind the line of a step.

        Args:
            step: of the figures.
            figures: what the training has measured.
            validation: what the newest validation has measured.
            validated: step of that validation.
        """
        self._progress.update(self._task, completed=max(step, validated))
        self._figures.plain = f"  {figures}  {validation}"
        if console.stderr.is_terminal:
            return
        # Not all steps are shown: tracking.every_steps may leave out those at which a line is due.
        is_due = step // self._lines_every > self._last_line // self._lines_every or step in (1, self.total_steps)
        if is_due and step > self._last_line:
            self._last_line, self._has_room = step, True
            say(f"step {step}/{self.total_steps}  {figures}")
        if self._has_room and validated >= step and validated > self._last_validation:
            self._last_validation, self._has_room = validated, False
            say(f"step {validated}/{self.total_steps}  {validation}")

    def stop(self) -> None:
        """Stop updating the bar, and leave it on the screen."""
        self._live.stop()
        say("")
