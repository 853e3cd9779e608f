"""What the page is told, as JSON that every browser reads and without control characters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loratune.board.comparison import SERIES, compare_runs
from loratune.board.opened import FIGURES, OpenedRun, value_text
from loratune.board.search import Found
from loratune.board.summary import RunSummary
from loratune.board.table import origin_text
from loratune.errors import LoratuneError
from loratune.printable import visible
from loratune.runs.going_on import next_command

CURVES = {**SERIES, "learning_rate": "learning rate"}
MOST_POINTS = 1200
"""Of a curve: more than a screen has columns for."""

Point = tuple[int, float]


def list_values(found: Found, folder: Path) -> dict[str, Any]:
    """Return what is in a folder."""
    values = found.values()
    origins = {model.name: origin_text(found, model) for model in found.models}
    models = [model | {"origin": origins[model["name"]]} for model in values["models"]]
    return values | {"title": folder.absolute().name, "models": models}


def run_values(found: Found, run: OpenedRun) -> dict[str, Any]:
    """Return everything of a run."""
    report = run.report
    return {
        **found.run_values(run.summary),
        "figures": [(name, text) for name, tell in FIGURES.items() if (text := tell(run)) is not None],
        "curves": _curves(run),
        "findings": None if run.findings is None else [_finding(vars(one)) for one in run.findings],
        "health": asdict(report.health) if report and report.health else None,
        "answers": [asdict(one) for one in run.told],
        "checks": [vars(check) for check in run.checks],
        "results": [_result(one.name, asdict(one.result)) for one in run.evaluations if one.result],
        "warnings": report.warnings if report else (),
        "settings": [(name, value_text(value)) for name, value in run.settings.items()],
        "changed": run.changed,
        "problems": [*run.problems, *run.summary.problems],
        "next": _next(run.summary),
    }


def comparison_values(runs: Sequence[OpenedRun]) -> dict[str, Any]:
    """Return a comparison, with whole curves in place of the losses at equal steps."""
    values = asdict(compare_runs(runs))
    for kind in ("settings", "data", "versions"):
        texts = [[None if one is None else value_text(one) for one in row["values"]] for row in values[kind]]
        values[kind] = [{**row, "values": told} for row, told in zip(values[kind], texts, strict=True)]
    return values | {"curves": [_curves(run) for run in runs]}


def _next(run: RunSummary) -> str | None:
    try:
        command = next_command(run.folder, run.state)
    except LoratuneError:  # its manifest is damaged, which is told
        return None
    return command.line if command else None


def _finding(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a finding with its sentence and the places of its rows apart."""
    sentence, *rows = values["text"].splitlines() or [""]
    return {**values, "text": sentence, "rows": [row.strip() for row in rows]}


def _result(name: str, result: dict[str, Any]) -> dict[str, Any]:
    figures = ("verdict", "sentence", "objection", "fallen", "tests", "rows", "compared", "baseline")
    return {"name": name, **{key: result[key] for key in (*figures, "decisions", "measures", "warnings")}}


def _curves(run: OpenedRun) -> dict[str, list[Point]]:
    found = {title: _points(run.metrics, name) for name, title in CURVES.items()}
    return {title: points for title, points in found.items() if points}


def _points(records: Sequence[Mapping[str, float]], name: str) -> list[Point]:
    points = {int(record["step"]): record[name] for record in records if math.isfinite(record.get(name, math.nan))}
    return thinned(sorted(points.items()))


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return the lowest and the highest point of each stretch of a long curve, so that no peak is lost.

    Args:
        points: by step.
        most: points to keep, about.
    """
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    kept = {points[0], points[-1]}
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept |= {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
    return sorted(kept)


def plain(value: Any) -> Any:
    """Return a value in JSON types: numbers that are not finite are null, and control characters visible signs."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {visible(str(key)): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value
