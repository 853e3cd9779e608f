"""findings.json: what the checks of a run's rows have found. It is typed, and read and written here alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loratune.runs.folder import FINDINGS
from loratune.runs.output import seal_file
from loratune.runs.typed_json import read_typed
from loratune.writing import write_json

FINDINGS_VERSION = 1


@dataclass(frozen=True)
class DataFinding:
    """One finding."""

    name: str
    level: str
    """`warn` or `note`."""
    count: int
    """How many rows have it."""
    text: str
    """The message; each line after the first is the place of a row."""


@dataclass(frozen=True)
class DataFindings:
    """Everything that was found."""

    findings: tuple[DataFinding, ...] = ()


def save_findings(run: Path, findings: Sequence[DataFinding]) -> None:
    """Save what was found, and seal the file.

    Args:
        run: run folder with a manifest.
        findings: of the training and validation rows.
    """
    write_json(run / FINDINGS, {"format_version": FINDINGS_VERSION, "findings": [vars(one) for one in findings]})
    seal_file(run, FINDINGS)


def read_findings(run: Path) -> tuple[DataFinding, ...] | None:
    """What was found in a run's rows; None of a run of an earlier version, which did not record it.

    Raises:
        LoratuneError: the file is damaged, or written by a later version of loratune.
    """
    if not (run / FINDINGS).is_file():
        return None
    return read_typed(DataFindings, run / FINDINGS, FINDINGS_VERSION).findings
