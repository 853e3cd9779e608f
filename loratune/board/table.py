"""What `loratune runs` prints: nothing is cut, whatever the width of the terminal."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from loratune import console
from loratune.board.comparison import SERIES, Asked, Curve, Row, RunComparison
from loratune.board.opened import value_text
from loratune.board.search import Found
from loratune.board.summary import EvaluationSummary, ModelSummary, RunSummary
from loratune.errors import counted
from loratune.printable import width_of
from loratune.runs.manifest import TrainedFile

SHOWN_STEPS = 8
"""Rows of the table of losses."""
NOTHING = "–"
RUN_COLUMNS = ("run", "state", "loss", "valid.", "exact", "eval", "size", "age")
MODEL_COLUMNS = ("model", "kind", "verified", "size", "age")


def show_list(found: Found, runs: Sequence[RunSummary], root: Path, with_models: bool) -> None:
    """Print a folder's runs, its models if wanted, and what else is there.

    Args:
        found: all that is in the folder.
        runs: the chosen runs, in order.
        root: the folder as the user names it.
        with_models: whether models, evaluations of nothing here and foreign folders are told.
    """
    if runs:
        lines = [(_run_cells(found, run, root), _run_details(found, run)) for run in runs]
        _show_entries(RUN_COLUMNS, lines)
    else:
        console.say(f"{root}: no run" + ("" if not found.runs else " that is asked for"))
    if not with_models:
        return
    if found.models:
        models = [(_model_cells(model, root), _model_details(found, model)) for model in found.models]
        _show_entries(MODEL_COLUMNS, models)
    for one in _without_run(found):
        console.say(f"evaluation {_place(root, one.folder)}: {_other_evaluation(one)}")
    if found.foreign:
        console.say(f"nothing of loratune's in: {', '.join(found.foreign)}")
    if found.is_cut:
        console.warn(f"{root} holds too many folders; not all were looked into")


def _show_entries(head: tuple[str, ...], entries: Sequence[tuple[tuple[str, ...], list[str]]]) -> None:
    """Print entries: a line of cells each, whose first is a name, and lines of details below it.

    Columns without a value are left out, and a name that leaves the others no room has a line of its own.
    """
    rows = [head, *(cells for cells, _ in entries)]
    columns = [place for place in range(1, len(head)) if any(cells[place] for cells, _ in entries)]
    width = shutil.get_terminal_size().columns
    widths = {place: max(width_of(row[place]) for row in rows) for place in columns}
    room = max(0, width - sum(each + 2 for each in widths.values()))
    name_width = min(room, max(width_of(row[0]) for row in rows))

    def line(cells: tuple[str, ...]) -> str:
        gap = name_width - width_of(cells[0])
        name = cells[0] + (" " * gap if gap >= 0 else f"\n{' ' * name_width}")
        figures = (cells[place] + " " * (each - width_of(cells[place])) for place, each in widths.items())
        return "  ".join((name, *figures)).rstrip() + "\n"

    spans = [(line(head), "context")]
    for cells, details in entries:
        told = (f"  {part}\n" for detail in details for part in console.wrapped(detail, width - 2))
        spans += [(line(cells), "plain"), *((part, "context") for part in told)]
    console.write_spans([*spans, ("\n", "context")], brackets=False)


def _without_run(found: Found) -> list[EvaluationSummary]:
    known = {run.digest for run in found.runs if run.digest}
    return [one for one in found.evaluations if one.digest not in known]


def _other_evaluation(one: EvaluationSummary) -> str:
    if one.problems:
        return one.problems[0]
    if one.result is None and one.benchmarks:
        return f"benchmark tasks ({', '.join(task.name for task in one.benchmarks.tasks)}) of {one.benchmarks.adapter}"
    return "its adapter is none of these runs', or has been trained anew since"


def _run_cells(found: Found, run: RunSummary, root: Path) -> tuple[str, ...]:
    is_on_the_way = run.state != "finished" and run.steps
    evaluations = found.evaluations_of(run)
    verdict = next((one.result.verdict for one in evaluations if one.result), "")
    return (
        _place(root, run.folder),
        f"{run.state} {run.step}/{run.steps}" if is_on_the_way else run.state,
        "" if run.loss is None else f"{run.loss:.4f}",
        "" if run.validation_loss is None else f"{run.validation_loss:.4f}",
        "" if run.exact_answers is None else f"{run.exact_answers:.1%}",
        verdict,
        console.memory(run.bytes),
        age(run.time),
    )


def _run_details(found: Found, run: RunSummary) -> list[str]:
    about = [run.base or "", *map(_file, run.data)]
    models = ", ".join(model.name for model in found.models_of(run))
    lines = [" · ".join(part for part in about if part)]
    lines += [f"tags: {', '.join(run.tags)}"] if run.tags else []
    lines += [f"in: {models}"] if models else []
    return [line for line in (*lines, *_changes(run.changed), *run.problems) if line]


def _model_cells(model: ModelSummary, root: Path) -> tuple[str, ...]:
    size, written = console.memory(model.bytes), age(model.time)
    return _place(root, model.folder), model.kind, model.verified or "", size, written


def _model_details(found: Found, model: ModelSummary) -> list[str]:
    return [origin_text(found, model), *_changes(model.changed), *model.problems]


def _place(root: Path, folder: Path) -> str:
    """Return the path of a folder as commands take it."""
    return str(root / folder.relative_to(root)) if folder != root else str(root)


def _changes(changed: Sequence[str]) -> list[str]:
    return [f"changed or missing: {', '.join(changed)}"] if changed else []


def _file(file: TrainedFile) -> str:
    return f"{Path(file.path).name} ({counted(file.rows, 'row')})"


def origin_text(found: Found, model: ModelSummary) -> str:
    """Return which run's adapter a model has, as far as hashes tell."""
    if not model.adapters:
        return "not recorded of which adapter"
    runs = found.runs_of(model)
    unknown = [sha256[:12] for sha256 in model.adapters if sha256 not in {run.weights_sha256 for run in runs}]
    names = [run.name for run in runs] + [f"an adapter of no run here ({sha256})" for sha256 in unknown]
    others = sorted({run.name for run in runs if _has_other_base(model, run)})
    base = f"; its base is not the one that {', '.join(others)} was trained on" if others else ""
    return f"of {', '.join(names)}{base}"


def _has_other_base(model: ModelSummary, run: RunSummary) -> bool:
    return None not in (model.base_sha256, run.base_sha256) and model.base_sha256 != run.base_sha256


def age(time: str | None) -> str:
    """Return how long ago a time in ISO 8601 was, in its largest unit; empty if it is not known."""
    try:
        then = datetime.fromisoformat(time or "")
    except ValueError:
        return ""
    if then.tzinfo is None:
        return ""
    seconds = max(0.0, (datetime.now(timezone.utc) - then).total_seconds())
    return " ".join(console.duration(round(seconds)).split()[:2])


def show_comparison(found: RunComparison) -> None:
    """Print runs beside each other."""
    for problem in found.problems:
        console.warn(problem)
    _show("", found.runs, found.figures)
    _show("settings that differ", found.runs, found.settings, "no setting differs")
    _show("data that differs, with its rows", found.runs, found.data, _about_same_files(found))
    _show("versions that differ", found.runs, found.versions)
    for curve in found.curves:
        _show_curve(curve, found.runs)
    if not found.curves:
        console.say("no step was logged in all of them")
    for asked in found.answers:
        console.table(_asked_rows(found.runs, asked), is_result=True)


def _about_same_files(found: RunComparison) -> str:
    """Return how the data of runs compares whose files are the same: trained rows follow from settings too."""
    differing = [row.name for row in found.settings if row.name.startswith("data.") or row.name == "seed"]
    if not differing:
        return "the data is the same"
    return (
        "the files of rows are the same; settings by which rows are read, split and ordered differ: "
        f"{', '.join(differing)}"
    )


def _asked_rows(runs: Sequence[str], asked: Asked) -> list[tuple[str, str]]:
    """Return a question and its answers; bases that answer alike, of which most are one model, answer once."""
    bases = [(f"{name}: base", text) for name, text in zip(runs, asked.bases, strict=True) if text is not None]
    if len({text for _, text in bases}) == 1:
        bases = [("base", bases[0][1])]
    answers = [(name, text) for name, text in zip(runs, asked.answers, strict=True) if text is not None]
    return [("question", asked.question), ("expected", asked.expected), *bases, *answers]


def _show(title: str, runs: Sequence[str], rows: Sequence[Row], otherwise: str = "") -> None:
    if rows:
        cells = [(row.name, *(NOTHING if value is None else value_text(value) for value in row.values)) for row in rows]
        console.comparison([(title, *runs), *cells], is_result=True)
    elif otherwise:
        console.say(otherwise)


def _show_curve(curve: Curve, runs: Sequence[str]) -> None:
    form = "{:.1%}" if curve.name.startswith("exact") else "{:.4f}"
    count = len(curve.steps)
    places = sorted({round(place * (count - 1) / max(1, SHOWN_STEPS - 1)) for place in range(min(SHOWN_STEPS, count))})
    places = list(range(count)) if count <= SHOWN_STEPS else places
    rows = [Row(f"step {curve.steps[at]}", tuple(form.format(each[at]) for each in curve.values)) for at in places]
    _show(curve.name, runs, rows)
    if curve.name == SERIES["loss"] and any(len(set(row.values)) > 1 for row in rows):
        console.say("a training loss is the mean since the line before it, which resuming and every_steps change")
