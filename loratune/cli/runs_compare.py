"""`loratune runs compare`: puts runs beside each other."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from loratune.board.comparison import RunComparison, compare_runs
from loratune.board.opened import OpenedRun, open_place
from loratune.board.table import show_comparison
from loratune.cli.documents import Document
from loratune.errors import Exit, LoratuneError, together

DOCUMENT = Document("runs-compare", 1, lambda: RunComparison)
DETAILS = """\
Shows settings, data and versions that differ, the losses at the steps that all runs have logged, and what their bases
and adapters answer to the same questions. Data is compared by hash and by the number of rows that were used."""


def command(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, two or more.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON to stdout.")] = False,
) -> None:
    if len(runs) < 2:
        raise LoratuneError("give two runs or more", Exit.USAGE)
    found = compare_runs(_opened(runs))
    if json:
        DOCUMENT.write(asdict(found))
    else:
        show_comparison(found)


def _opened(runs: list[Path]) -> list[OpenedRun]:
    """Open all runs.

    Raises:
        LoratuneError: tells of every folder that is no run.
    """
    opened, refused = list[OpenedRun](), list[LoratuneError]()
    for run in runs:
        try:
            opened.append(open_place(run))
        except LoratuneError as error:
            refused.append(error)
    if refused:
        raise together(refused)
    return opened
