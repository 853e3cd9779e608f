"""Compares runs: settings, data, losses at equal steps, and answers to the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.board.opened import CHECKS, FIGURES, OpenedRun
from loratune.runs.folder import RECIPE

SERIES = {"loss": "training loss", "validation_loss": "validation loss", "exact_answers": "exact answers"}


@dataclass(frozen=True)
class Row:
    """One thing of all runs."""

    name: str
    values: tuple[Any, ...]
    """Of each run; None where it has none."""


@dataclass(frozen=True)
class Curve:
    """A measure at the steps at which all runs have it."""

    name: str
    steps: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]
    """Of each run, by step."""


@dataclass(frozen=True)
class Asked:
    """A question, with the answers of each run's base and adapter; None where it was not asked."""

    question: str
    expected: str
    bases: tuple[str | None, ...]
    answers: tuple[str | None, ...]


@dataclass(frozen=True)
class RunComparison:
    """Runs beside each other."""

    runs: tuple[str, ...]
    figures: tuple[Row, ...]
    settings: tuple[Row, ...]
    """Those that differ."""
    versions: tuple[Row, ...]
    """Libraries whose versions differ."""
    data: tuple[Row, ...]
    """Files that differ, by hash and number of used rows: the values are numbers of rows."""
    curves: tuple[Curve, ...]
    answers: tuple[Asked, ...]
    problems: tuple[str, ...]


def compare_runs(runs: Sequence[OpenedRun]) -> RunComparison:
    """Compare runs.

    Args:
        runs: at least two.
    """
    figures = [Row(name, tuple(tell(run) for run in runs)) for name, tell in FIGURES.items()]
    return RunComparison(
        runs=tuple(run.summary.name for run in runs),
        figures=tuple(row for row in figures if _says_something(row)),
        settings=_differing([run.settings for run in runs]),
        versions=_differing([run.manifest.versions for run in runs]),
        data=_data(runs),
        curves=tuple(curve for name in SERIES if (curve := _curve(name, runs)).steps),
        answers=_answers(runs),
        problems=tuple(f"{run.summary.name}: {problem}" for run in runs for problem in _problems(run)),
    )


def _says_something(row: Row) -> bool:
    return any(value is not None for value in row.values) and (row.name != CHECKS or len(set(row.values)) > 1)


def _problems(run: OpenedRun) -> list[str]:
    edited = f"{RECIPE} has been changed since the run wrote it, and so its settings may not be those of the training"
    return [*run.problems, *([edited] if RECIPE in run.changed else [])]


def _differing(values: Sequence[Any]) -> tuple[Row, ...]:
    """Return the names whose values are not the same in all mappings that could be read."""
    names = dict.fromkeys(name for each in values for name in each)
    rows = (Row(name, tuple(each.get(name) for each in values)) for name in names)
    known = [place for place, each in enumerate(values) if each]
    return tuple(row for row in rows if any(row.values[place] != row.values[known[0]] for place in known))


def _data(runs: Sequence[OpenedRun]) -> tuple[Row, ...]:
    used = [{(file.sha256, Path(file.path).name): file.rows for file in run.summary.data} for run in runs]
    # One file may have several names.
    names = {sha256: name for each in reversed(used) for sha256, name in each}
    rows = [{sha256: count for (sha256, _), count in each.items()} for each in used]
    return tuple(Row(f"{names[row.name]} {row.name[:12]}", row.values) for row in _differing(rows))


def _curve(name: str, runs: Sequence[OpenedRun]) -> Curve:
    values = [{int(record["step"]): record[name] for record in run.metrics if name in record} for run in runs]
    steps = sorted(set.intersection(*(set(each) for each in values)))
    return Curve(SERIES[name], tuple(steps), tuple(tuple(each[step] for step in steps) for each in values))


def _answers(runs: Sequence[OpenedRun]) -> tuple[Asked, ...]:
    told = [{one.question: one for one in run.told} for run in runs]
    asked = []
    for question in dict.fromkeys(question for each in told for question in each):
        ones = [each.get(question) for each in told]
        expected = next(one.expected for one in ones if one)
        bases, answers = (tuple(getattr(one, name) if one else None for one in ones) for name in ("base", "adapter"))
        asked.append(Asked(question, expected, bases, answers))
    return tuple(asked)
