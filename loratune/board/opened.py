"""A run with all that its folder says of it, for the page and for comparisons; damage is told, never raised."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratune import console
from loratune.board.search import Found, Search
from loratune.board.summary import EvaluationSummary, ModelSummary, RunSummary, summarise_model, summarise_run
from loratune.board.walk import Kind, Place
from loratune.errors import Exit, LoratuneError, counted
from loratune.plain_files import is_file, require_folder
from loratune.recipe.loading import load_written_recipe
from loratune.runs.data_findings import DataFinding, read_findings
from loratune.runs.folder import MANIFEST, RECIPE, REPORT, STATUS, VERIFICATION, read_metrics
from loratune.runs.manifest import Manifest, read_manifest
from loratune.runs.model_check import ModelCheck
from loratune.runs.remembered import remembered_sha256
from loratune.runs.report import Report, Told, read_report
from loratune.runs.seals import ALL_SEALED, changed_files
from loratune.runs.status import require_run

CHECKS = "model checks"
"""Figure of many words, which a comparison shows where it differs."""
OWN = ("output",)
"""Settings that are of one run alone."""


@dataclass
class OpenedRun:
    """A run; what cannot be read is left out, and told in `problems`."""

    summary: RunSummary
    metrics: list[dict[str, float]]
    evaluations: list[EvaluationSummary]
    models: list[ModelSummary]
    manifest: Manifest = field(default_factory=Manifest)
    report: Report | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted name → value, in JSON types."""
    findings: tuple[DataFinding, ...] | None = None
    """Of its rows; None if they were not recorded."""
    changed: list[str] = field(default_factory=list)
    """Files that differ from their hashes."""
    problems: list[str] = field(default_factory=list)

    @property
    def checks(self) -> tuple[ModelCheck, ...]:
        """What was measured on the model before the first step."""
        return (self.report.checks if self.report else ()) or self.manifest.checks

    @property
    def told(self) -> tuple[Told, ...]:
        """The questions after training, with the answers of base and adapter."""
        health = self.report.health if self.report else None
        return health.answers.told if health and health.answers else ()


def open_run(
    found: Found, summary: RunSummary, metrics: Callable[[Path], list[dict[str, float]]] = read_metrics
) -> OpenedRun:
    """Read all of a run that is shown.

    Args:
        found: where its evaluations and models are looked for.
        summary: the run.
        metrics: reads the metrics of a folder.
    """
    folder = summary.folder
    run = OpenedRun(summary, [], found.evaluations_of(summary), found.models_of(summary))

    def read(name: str, make: Callable[[], Any]) -> None:
        try:
            setattr(run, name, make())
        except (LoratuneError, OSError) as error:
            run.problems.append(str(error))

    read("metrics", lambda: metrics(folder))
    read("manifest", lambda: read_manifest(folder))
    read("settings", lambda: flat_settings(load_written_recipe(folder / RECIPE).model_dump(mode="json")))
    read("findings", lambda: read_findings(folder))
    if (folder / REPORT).is_file():
        read("report", lambda: read_report(folder))
    if (folder / MANIFEST).is_file() and run.manifest.files:
        parts = {name.partition("/")[0] for name in run.manifest.files} & {*ALL_SEALED}
        read("changed", lambda: changed_files(folder, run.manifest, parts, remembered_sha256))
    return run


def flat_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted name → value of the settings of a recipe."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flat_settings(value, f"{prefix}{name}.")
        elif prefix or name not in OWN:
            flat[f"{prefix}{name}"] = value
    return flat


def value_text(value: Any) -> str:
    """Return a setting's value as a recipe may have it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _loss(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _arrow(before: float | None, after: float | None) -> str | None:
    return " → ".join(text for text in (_loss(before), _loss(after)) if text) or None


def _steps(run: OpenedRun) -> str:
    one = run.summary
    return f"{one.step} of {one.steps}" if one.steps and one.steps != one.step else str(one.step)


def _rows(run: OpenedRun) -> str | None:
    """Return the numbers of rows after the split; before the end of the run, that of all rows."""
    split = run.report.rows if run.report else None
    if split and split.training:
        total = counted(split.training + split.validation, "row")
        return f"{total}: {split.training:,} trained, {split.validation:,} for validation"
    return None if run.summary.rows is None else counted(run.summary.rows, "row")


def _validation(run: OpenedRun) -> str | None:
    losses = run.report.validation_loss if run.report else None
    if losses is None:
        return _loss(run.summary.validation_loss)
    best = f", best {losses.best:.4f} at step {losses.best_step}" if losses.best is not None else ""
    return f"{_arrow(losses.before, losses.after)}{best}"


def _exact(run: OpenedRun) -> str | None:
    exact = run.report.exact_answers if run.report else None
    if exact is None:
        share = run.summary.exact_answers
        return None if share is None else f"{share:.1%}"
    before = "" if exact.before is None else f"{exact.before:.1%} → "
    return f"{before}{exact.after:.1%} of {exact.answers}, best {exact.best:.1%} at step {exact.best_step}"


def _seconds(run: OpenedRun) -> float | None:
    if run.report and run.report.seconds is not None:
        return run.report.seconds
    return run.metrics[-1].get("seconds") if run.metrics else None


def _time(run: OpenedRun) -> str | None:
    seconds = _seconds(run)
    return None if seconds is None else console.duration(seconds)


def _speed(run: OpenedRun) -> str | None:
    speeds = [record["tokens_per_second"] for record in run.metrics if "tokens_per_second" in record]
    speed = run.report.tokens_per_second if run.report else speeds[-1] if speeds else None
    return f"{speed:,.0f} tokens/s" if speed else None


def _memory(run: OpenedRun) -> str | None:
    peak = run.report.peak_memory_bytes if run.report else None
    return console.memory(peak) if peak else None


def _health(run: OpenedRun) -> str | None:
    if run.report is None or run.report.health is None:
        return None
    return "; ".join(run.report.health.sentences) or "nothing stands out"


def _changed_answers(run: OpenedRun) -> str | None:
    return f"{sum(one.has_changed for one in run.told)} of {len(run.told)}" if run.told else None


def _checked(run: OpenedRun) -> str | None:
    return "; ".join(f"{check.name}: {check.result}" for check in run.checks) or None


def _evaluated(run: OpenedRun) -> str | None:
    told = (f"{one.result.verdict} ({one.name})" for one in run.evaluations if one.result)
    return ", ".join(told) or None


def _proved(run: OpenedRun) -> str | None:
    return ", ".join(f"{one.kind} {one.name}: {one.verified or 'read back'}" for one in run.models) or None


FIGURES: dict[str, Callable[[OpenedRun], str | None]] = {
    "state": lambda run: run.summary.state,
    "steps": _steps,
    "base": lambda run: run.summary.base,
    "base weights": lambda run: (run.summary.base_sha256 or "")[:12] or None,
    "rows": _rows,
    "training loss": lambda run: (
        _arrow(run.report.loss.first, run.report.loss.last)
        if run.report and run.report.loss
        else _loss(run.summary.loss)
    ),
    "validation loss": _validation,
    "exact answers": _exact,
    "time": _time,
    "speed": _speed,
    "peak memory": _memory,
    "health": _health,
    "answers changed": _changed_answers,
    CHECKS: _checked,
    "evaluation": _evaluated,
    "merged, exported": _proved,
    "files changed": lambda run: ", ".join(run.changed) or None,
}
"""What is said of a run in a line each; None where nothing is known."""


def open_place(folder: Path) -> OpenedRun:
    """Read all of the run in a folder; its evaluations and models are looked for within and beside it.

    Raises:
        LoratuneError: the folder is no run; of a model it names the runs that it was made from.
    """
    if model := find_model(folder):
        runs = [str(folder.parent / run.name) for run in beside(folder, ("run",)).runs_of(model)]
        made = " and ".join(runs) or "which does not lie beside it"
        raise LoratuneError(
            f"{folder}: a {model.kind}, not a run; give the run that it was made from, {made}", Exit.MODEL
        )
    require_run(folder)
    return open_run(beside(folder), summarise_run(Place(folder, str(folder), "run")))


def find_model(folder: Path) -> ModelSummary | None:
    """Return the merged model or export in a folder; None for a run, or anything else."""
    require_folder(folder, "a run folder")
    if is_file(folder / STATUS) or not is_file(folder / VERIFICATION):
        return None
    return summarise_model(Place(folder, str(folder), "model"))


def beside(folder: Path, kinds: Sequence[Kind] = ("model", "evaluation")) -> Found:
    """Return what lies directly within a folder and beside it; the folder above may be one of everything."""
    return Search(folder.absolute().parent, kinds, depth=2).find()
