"""The only module that prints, beside `progress`: messages and tables to stderr, results to stdout."""

from __future__ import annotations

import codecs
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import pairwise
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from loratune.commands import Command
from loratune.printable import printable, printable_json
from loratune.runtime import is_main_process
from loratune.streams import delivered

stderr = Console(stderr=True, highlight=False, quiet=not is_main_process())
"""Of the main process; the others print errors alone."""

WORD = re.compile(r"\s*\S+\s*")


def say(message: str, style: str = "", wraps: bool = True) -> None:
    """Print a line for the user that is not a result; one with an address is not wrapped, so that it can be copied."""
    text = Text(printable(message), style=style)
    if wraps:
        _tell(text)
    else:
        stderr.print(text, soft_wrap=True)


def _tell(text: Text) -> None:
    """Print a text in lines that fit, of which a path can be copied whole."""
    for line in text.split("\n", allow_blank=True):
        for part in line.divide(_breaks(line.plain, stderr.width)):
            part.rstrip()
            stderr.print(part, soft_wrap=True)


def _breaks(line: str, columns: int) -> list[int]:
    """Return where a line is broken between words; a word that is wider stays whole, on a line of its own."""
    places, used = list[int](), 0
    for word in WORD.finditer(line):
        width = cell_len(word[0].rstrip())
        if used and used + width > columns:
            places.append(word.start())
            used = 0
        used += cell_len(word[0])
    return places


def next_step(command: Command, indent: str = "") -> None:
    """Print a suggested command, in lines that can be pasted into a shell."""
    for line in command_lines(command, stderr.width - len(indent)):
        say(indent + line, wraps=False)


def command_lines(command: Command, columns: int) -> list[str]:
    """Return a command's text in lines that fit, each but the last with the backslash by which a shell reads on.

    Where that takes several, the purpose has a line of its own, so that the others can be copied whole. A flag stays
    with its value, and what is longer than a line stays whole, as does a word with line breaks.
    """
    if cell_len(str(command)) <= columns:
        return [str(command)]
    first, *parts = _parts(command.words)
    lines = [f"  {first}"]
    for part in parts:
        last, widest = lines[-1].rpartition("\n")[2], max(map(cell_len, part.split("\n")))
        if cell_len(last) + 1 + widest + len(" \\") <= columns:
            lines[-1] += f" {part}"
        else:
            lines[-1] += " \\"
            lines.append(f"    {part}")
    return [f"{command.purpose}:", *lines, *(f"    ({name}: {meaning})" for name, meaning in command.chosen.items())]


def _parts(words: Sequence[str]) -> list[str]:
    """Return the words of a command as a shell takes them, a flag and its value as one."""
    parts = list[str]()
    for word, before in zip(words, ("", *words[:-1]), strict=True):
        if before.startswith("-") and not word.startswith("-"):
            parts[-1] += f" {shlex.quote(word)}"
        else:
            parts.append(shlex.quote(word))
    return parts


def wrapped(text: str, columns: int) -> list[str]:
    """Return a text in lines that are broken between words, with one space between two; see `_breaks`."""
    line = " ".join(text.split())
    places = [0, *_breaks(line, columns), len(line)]
    return [line[start:end].rstrip() for start, end in pairwise(places)] if line else []


def warn(message: str) -> None:
    _tell(Text("warning: ", style="yellow").append(printable(message), style="default"))


def error(message: str) -> None:
    """Print why the command failed; every process prints it, since only one of several may have failed."""
    stderr.quiet = False
    _tell(Text("error: ", style="bold red").append(printable(message), style="default"))


def interject(message: str) -> None:
    """Print a line from a signal handler, which may have interrupted the console while printing."""
    with suppress(OSError):
        os.write(2, f"\n{message}\n".encode())


def table(rows: list[tuple[str, str]], title: str = "", is_result: bool = False) -> None:
    """Print names and values in two columns; results go to stdout."""
    grid = _grid()
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in rows:
        grid.add_row(Text(printable(name)), Text(printable(value)))
    _print(grid, is_result, title)


def _print(grid: Table, is_result: bool = False, title: str = "") -> None:
    """Print a table below its title, which rich itself would wrap at the width of the table."""
    page = Console(highlight=False, quiet=not is_main_process()) if is_result else stderr
    with delivered() if is_result else nullcontext():
        page.print(*([Text(printable(title), style="bold")] if title else []), grid, "", sep="\n")


def comparison(
    rows: Sequence[tuple[str, ...]], is_result: bool = False, is_text: bool = False, title: str = ""
) -> None:
    """Print a table with headers in the first row: figures, right-aligned, or texts; results to stdout, as texts."""
    grid = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for place, name in enumerate(rows[0]):
        side: Any = "left" if is_result or is_text or not place else "right"
        grid.add_column(Text(printable(name)), justify=side, overflow="fold")
    for row in rows[1:]:
        grid.add_row(*(Text(printable(value)) for value in row))
    _print(grid, is_result, title)


def bars(counts: list[tuple[str, int]], title: str) -> None:
    """Print a histogram with a label, a bar and the count in each line."""
    grid = _grid()
    grid.add_column(style="dim", justify="right", no_wrap=True)
    grid.add_column(no_wrap=True)
    width, most = max(10, min(40, stderr.width - 30)), max(count for _, count in counts)
    for label, count in counts:
        eighths = round(count / most * width * 8)
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        grid.add_row(Text(printable(label)), f"{bar or '▏' * (count > 0)} {count:,}")
    _print(grid, title=title)


def _grid() -> Table:
    return Table(box=None, show_header=False, padding=(0, 2, 0, 0))


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
    """Format a size: 988 MB, 1.3 GB; the unit is chosen after rounding, so that there is no 1000 MB."""
    text, value = f"{size_bytes:.0f} B", round(size_bytes) / 1e3
    for unit in ("kB", "MB", "GB", "TB"):
        if value < 1:
            break
        value = round(value, 1 if value < 99.95 else 0)
        text, value = f"{value:.{1 if value < 100 else 0}f} {unit}", value / 1e3
    return text


def duration(seconds: float) -> str:
    """Return a time in two units at most: 40 s, 3 min 20 s, 2 h 5 min, 3 d."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    for size, unit, small, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    raise AssertionError(seconds)


@contextmanager
def status(message: str) -> Iterator[None]:
    """Show a spinner during the `with` block; print a plain line if there is no terminal."""
    if not stderr.is_terminal:
        say(message)
        yield
        return
    with stderr.status(Text(printable(message))):
        yield
