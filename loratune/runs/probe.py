"""Rows and prompts that training sets aside to compare merged and exported models with base + adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.errors import Exit, LoratuneError
from loratune.plain_files import read_json_object
from loratune.runs.folder import PROBE
from loratune.runs.output import seal_file
from loratune.writing import write_json

MAX_ROWS = 16
MAX_TOKENS = 400
"""Of all rows together: enough to distinguish models, and a few seconds of computation on a laptop."""
MAX_QUESTIONS = 3
BUILT_IN_QUESTIONS = ("Who are you?", "你是谁？", "What is the capital of France?")


@dataclass(frozen=True)
class ProbeRow:
    """A row; positions count whose next label is not negative."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Probe:
    """Rows and prompts for comparisons."""

    rows: list[ProbeRow]
    questions: list[list[dict[str, str]]]
    """Messages that end with a user message."""


def save_probe(run: Path, rows: Sequence[dict[str, Any]], conversations: Sequence[Sequence[Any]]) -> None:
    """Save some rows and prompts, evenly spaced, and seal the file.

    Args:
        run: run folder with a manifest.
        rows: encoded rows with `input_ids` and `labels`, lists of int.
        conversations: their messages, ending with an answer.
    """
    kept: list[dict[str, list[int]]] = []
    tokens = 0
    for row in _spread(rows, MAX_ROWS):
        tokens += len(row["input_ids"])
        if kept and tokens > MAX_TOKENS:
            break
        kept.append({"input_ids": list(row["input_ids"]), "labels": list(row["labels"])})
    questions = [list(messages[:-1]) for messages in _spread(conversations, MAX_QUESTIONS)]
    write_json(run / PROBE, {"rows": kept, "questions": questions})
    seal_file(run, PROBE)


def read_probe(run: Path | None) -> Probe:
    """Read a run's rows and prompts; for a plain adapter, return built-in prompts without rows.

    Raises:
        LoratuneError: the run's file is damaged.
    """
    built_in = [[{"role": "user", "content": question}] for question in BUILT_IN_QUESTIONS]
    if run is None or not (run / PROBE).is_file():
        return Probe([], built_in)
    values = read_json_object(run / PROBE)
    try:
        rows = [ProbeRow(row["input_ids"], row["labels"]) for row in values["rows"]]
        questions = values["questions"]
        is_whole = all(map(_can_be_compared, rows)) and all(map(_can_be_asked, questions))
    except (KeyError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise LoratuneError(
            f"{run / PROBE}: damaged; restore it, or delete it and give --force: built-in questions take its place",
            Exit.MODEL,
        )
    return Probe(rows, questions or built_in)


def _can_be_compared(row: ProbeRow) -> bool:
    is_of_numbers = all(isinstance(number, int) for number in [*row.input_ids, *row.labels])
    return is_of_numbers and len(row.input_ids) == len(row.labels) and max(row.labels[1:], default=-1) >= 0


def _can_be_asked(question: list[dict[str, str]]) -> bool:
    return len(question) > 0 and all({"role", "content"} <= message.keys() for message in question)


def _spread(rows: Sequence[Any], limit: int) -> list[Any]:
    step = max(1, len(rows) // limit)
    return [rows[place] for place in range(0, len(rows), step)][:limit]
