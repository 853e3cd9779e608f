"""Shows an examination in the terminal."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from loratune import console
from loratune.doctor.examination import Examination
from loratune.doctor.finding import Finding

INDENT = 8
"""Columns of a state, such as `broken`."""


def show(examination: Examination) -> None:
    """Print the findings and their counts to stdout."""
    columns = max(40, shutil.get_terminal_size().columns)
    for group in examination.groups:
        lines = [span for finding in group.findings for span in _spans(finding, columns - INDENT)]
        console.write_spans([(f"{group.title}\n", "title"), *lines, ("\n", "plain")], brackets=False)
    console.write_result(examination.summary())


def _spans(finding: Finding, columns: int) -> Iterator[tuple[str, str]]:
    """Yield texts of a finding and their styles."""
    yield finding.state.ljust(INDENT), finding.state
    parts = f"{finding.name}: {finding.text}".splitlines()
    lines = [line for part in parts for line in console.wrapped(part, columns)]
    yield ("\n" + " " * INDENT).join(lines) + "\n", "plain"
    for command in finding.remedies:
        for line in console.command_lines(command, columns - 2):
            yield f"{' ' * INDENT}  {line}\n", "command"
