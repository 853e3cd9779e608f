"""The only module that prints: messages, tables and progress to stderr, results to stdout."""

from __future__ import annotations

import codecs
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from loratune.printable import printable, printable_json
from loratune.runtime import is_main_process
from loratune.streams import delivered

LINE_SECONDS = 15
"""Minimum interval of progress lines without a terminal."""
_stderr = Console(stderr=True, highlight=False, quiet=not is_main_process())


def say(message: str, style: str = "") -> None:
    """Print a line for the user that is not a result."""
    _stderr.print(Text(printable(message), style=style))


def next_step(message: str) -> None:
    """Print a suggested command; lines are not wrapped, so that they can be copied."""
    _stderr.print(Text(printable(message)), soft_wrap=True)


def warn(message: str) -> None:
    _stderr.print(Text("warning: ", style="yellow").append(printable(message), style="default"))


def error(message: str) -> None:
    """Print why the command failed; every process prints it, since only one of several may have failed."""
    _stderr.quiet = False
    _stderr.print(Text("error: ", style="bold red").append(printable(message), style="default"))


def interject(message: str) -> None:
    """Print a line from a signal handler, which may have interrupted the console while printing."""
    with suppress(OSError):
        os.write(2, f"\n{message}\n".encode())


def table(rows: list[tuple[str, str]], title: str = "", is_result: bool = False) -> None:
    """Print names and values in two columns; results go to stdout."""
    grid = _grid(title)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(name, Text(printable(value)))
    _print(grid, is_result)


def _print(grid: Table, is_result: bool) -> None:
    page = Console(highlight=False, quiet=not is_main_process()) if is_result else _stderr
    with delivered() if is_result else nullcontext():
        page.print(grid, "", sep="\n")


def comparison(rows: Sequence[tuple[str, ...]], is_result: bool = False, is_text: bool = False) -> None:
    """Print a table with headers in the first row: figures, right-aligned, or texts; results to stdout, as texts."""
    grid = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for place, name in enumerate(rows[0]):
        side: Any = "left" if is_result or is_text or not place else "right"
        grid.add_column(Text(printable(name)), justify=side, overflow="fold")
    for row in rows[1:]:
        grid.add_row(*(Text(printable(value)) for value in row))
    _print(grid, is_result)


def bars(counts: list[tuple[str, int]], title: str) -> None:
    """Print a histogram with a label, a bar and the count in each line."""
    grid = _grid(title)
    grid.add_column(style="dim", justify="right", no_wrap=True)
    grid.add_column(no_wrap=True)
    width, most = max(10, min(40, _stderr.width - 30)), max(count for _, count in counts)
    for label, count in counts:
        eighths = round(count / most * width * 8)
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        grid.add_row(label, f"{bar or '▏' * (count > 0)} {count:,}")
    _stderr.print(grid, "", sep="\n")


def _grid(title: str) -> Table:
    style: dict[str, Any] = {"title_justify": "left", "title_style": "bold"}
    return Table(title=title, box=None, show_header=False, padding=(0, 2, 0, 0), **style)


def help_page(usage: str, text: str, panels: dict[str, list[tuple[str, str, str]]]) -> None:
    """Print a help page to stdout.

    Args:
        usage: the usage line.
        text: description of the command.
        panels: title → (name, default, help) of each entry.
    """
    page = Console(highlight=False)
    paragraphs = [Text(" ".join(paragraph.split()) + "\n") for paragraph in text.split("\n\n")]
    with delivered():
        page.print(Text(usage.strip() + "\n", style="bold"), *paragraphs, sep="\n")
        for title, entries in panels.items():
            lines = Text("\n").join(_help_entry(*entry, width=page.width - 4) for entry in entries)
            page.print(Panel(lines, title=title, title_align="left", border_style="dim"))


def _help_entry(name: str, default: str, text: str, width: int) -> Text:
    entry = Text(name, style="cyan")
    if default:
        gap = width - cell_len(default)
        entry.append(" " * (gap - entry.cell_len) if entry.cell_len < gap - 1 else "\n" + " " * gap)
        entry.append(default, style="dim")
    entry.append("\n")
    for line in Text(text).wrap(Console(), width - 4):
        entry.append("    ").append_text(line).append("\n")
    entry.right_crop(1)
    return entry


def write_result(text: str, end: str = "\n") -> None:
    """Print a result to stdout unchanged, and flush, since it may be a chunk of a stream."""
    if is_main_process():
        with delivered():
            sys.stdout.write(printable(text) + end)


def write_json(value: Any) -> None:
    """Print a result as JSON to stdout."""
    write_result(printable_json(value, is_ascii=not takes_all_characters()))


def takes_all_characters() -> bool:
    """Return whether stdout can encode every character; an encoding's escapes would not be valid JSON or YAML."""
    return codecs.lookup(sys.stdout.encoding or "utf-8").name.startswith("utf-")


SPAN_STYLES = {
    "plain": "",
    "title": "bold",
    "context": "dim",
    "context control": "dim reverse",
    "trained": "green",
    "trained control": "green reverse",
    "fine": "green",
    "slower": "yellow",
    "broken": "bold red",
    "command": "cyan",
}


def write_spans(spans: list[tuple[str, str]], brackets: bool = True) -> None:
    """Print text in the colours of `SPAN_STYLES` to stdout; without colours, trained text is put in ⟦ ⟧.

    Args:
        spans: text and name of its style.
        brackets: whether to use the brackets.
    """
    page = Console(highlight=False, soft_wrap=True)
    line, was_trained = Text(), False
    for text, kind in [*spans, ("", "context")]:
        is_trained = kind.startswith("trained")
        if brackets and is_trained != was_trained and not page.color_system:
            line.append("⟦" if is_trained else "⟧")
        line.append(printable(text), SPAN_STYLES[kind])
        was_trained = is_trained
    with delivered():
        page.print(line, end="")


def memory(size_bytes: float) -> str:
    """Format a size: 988 MB, 1.3 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            value = size_bytes / scale
            return f"{value:.1f} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return f"{size_bytes:.0f} B"


@contextmanager
def status(message: str) -> Iterator[None]:
    """Show a spinner during the `with` block; print a plain line if there is no terminal."""
    if not _stderr.is_terminal:
        say(message)
        yield
        return
    with _stderr.status(message):
        yield


@contextmanager
def byte_progress(message: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show a bar; yields a function to call with each number of processed bytes. One line without a terminal."""
    columns = (TextColumn(message), BarColumn(bar_width=None), DownloadColumn(), TimeElapsedColumn())
    with _advancing(message, total_bytes, *columns) as advance:
        yield advance


@contextmanager
def row_progress(message: str) -> Iterator[Callable[[int], None]]:
    """Show a count of rows; yields a function to call with each number of new rows. One line without a terminal."""
    columns = (SpinnerColumn(), TextColumn(message), TextColumn("{task.completed:,} rows"), TimeElapsedColumn())
    with _advancing(message, None, *columns) as advance:
        yield advance


@contextmanager
def _advancing(message: str, total: int | None, *columns: ProgressColumn) -> Iterator[Callable[[int], None]]:
    if not _stderr.is_terminal:
        say(message)
        yield lambda _: None
        return
    with Progress(*columns, console=_stderr, expand=total is not None, transient=True) as progress:
        task = progress.add_task(message, total=total)
        yield lambda count: progress.advance(task, count)


@contextmanager
def counted_progress(noun: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """Show a bar with the remaining time; yields a function to call with the count and some figures.

    Without a terminal it prints lines.
    """
    if not _stderr.is_terminal:
        yield _telling_now_and_then(noun, total)
        return
    columns = (
        *(SpinnerColumn(), TextColumn(f"{{task.completed:,}}/{total:,} {noun}"), BarColumn(bar_width=None)),
        *(TextColumn("{task.fields[figures]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
    )
    with Progress(*columns, console=_stderr, expand=True, transient=True) as progress:
        task = progress.add_task(noun, total=total, completed=done, figures="")
        yield lambda count, figures: progress.update(task, completed=count, figures=figures)


def _telling_now_and_then(noun: str, total: int) -> Callable[[int, str], None]:
    printed = time.monotonic()

    def tell(count: int, figures: str) -> None:
        nonlocal printed
        if count == total or time.monotonic() - printed > LINE_SECONDS:
            printed = time.monotonic()
            say(f"{count:,}/{total:,} {noun}  {figures}".rstrip())

    return tell


class StepProgress:
    """The training progress bar with a line of metrics; plain lines without a terminal."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self._lines_every = max(1, total_steps // 20)
        self._last_line = 0
        columns = (SpinnerColumn(), TextColumn("step {task.completed}/{task.total}"), BarColumn(bar_width=None))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._progress = Progress(*columns, *times, console=_stderr, expand=True)
        self._task = self._progress.add_task("training", total=total_steps)
        self._figures = Text("  waiting for the first step", style="dim")
        self._live = Live(Group(self._progress, self._figures), console=_stderr, refresh_per_second=4)

    def start(self) -> None:
        if _stderr.is_terminal:
            self._live.start()

    def update(self, step: int, figures: str) -> None:
        self._progress.update(self._task, completed=step)
        self._figures.plain = f"  {figures}"
        is_due = step % self._lines_every == 0 or step in (1, self.total_steps)
        if not _stderr.is_terminal and is_due and step > self._last_line:
            self._last_line = step
            say(f"step {step}/{self.total_steps}  {figures}")

    def stop(self) -> None:
        """Stop updating the bar, and leave it on the screen."""
        self._live.stop()
        say("")
