"""Rows set aside in training, on which later commands compare a model with base + adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.runs.folder import PROBE, read_json
from loratune.runs.writing import write_json

MAX_ROWS = 16
MAX_TOKENS = 2048
"""Of all rows together: enough to tell models apart, and a few seconds' work on a laptop."""


@dataclass(frozen=True)
class ProbeRow:
    """One row: where its labels are not negative a model's next token counts."""

    input_ids: list[int]
    labels: list[int]


def save_probe(run: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Keep some rows, spread evenly, with their ids and labels.

    Args:
        run: the run folder.
        rows: encoded rows with `input_ids` and `labels`, lists of int.
    """
    step = max(1, len(rows) // MAX_ROWS)
    kept: list[dict[str, list[int]]] = []
    tokens = 0
    for place in range(0, len(rows), step):
        row = rows[place]
        tokens += len(row["input_ids"])
        if len(kept) == MAX_ROWS or (kept and tokens > MAX_TOKENS):
            break
        kept.append({"input_ids": list(row["input_ids"]), "labels": list(row["labels"])})
    write_json(run / PROBE, {"rows": kept})


def read_probe(run: Path | None) -> list[ProbeRow]:
    """The rows that a run has set aside; none for a plain adapter."""
    if run is None or not (run / PROBE).is_file():
        return []
    return [ProbeRow(row["input_ids"], row["labels"]) for row in read_json(run / PROBE)["rows"]]
