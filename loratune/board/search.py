"""Searches a folder for runs, models and evaluations, and tells by hashes which belong together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from loratune.board.summary import (
    EvaluationSummary,
    ModelSummary,
    RunSummary,
    summarise_evaluation,
    summarise_model,
    summarise_run,
)
from loratune.board.walk import DEPTH, Kind, Place, Walk
from loratune.errors import Exit, LoratuneError
from loratune.evaluation.result import RESULT
from loratune.evaluation.tasks.result import TASKS_RESULT
from loratune.plain_files import require_folder
from loratune.runs.folder import MANIFEST, METRICS, REPORT, STATUS, TAGS, VERIFICATION

Summary: TypeAlias = RunSummary | ModelSummary | EvaluationSummary
READ = (STATUS, MANIFEST, REPORT, METRICS, TAGS, VERIFICATION, RESULT, TASKS_RESULT)
"""Files that a summary is made of."""
PASSING = ("running", "crashed")
"""States of a run that may change although no file does."""
SUMMARISE: dict[Kind, Callable[[Place], Summary | None]] = {
    "run": summarise_run,
    "model": summarise_model,
    "evaluation": summarise_evaluation,
}


@dataclass(frozen=True)
class Found:
    """What is in a folder."""

    runs: tuple[RunSummary, ...] = ()
    """The newest first."""
    models: tuple[ModelSummary, ...] = ()
    evaluations: tuple[EvaluationSummary, ...] = ()
    foreign: tuple[str, ...] = ()
    """Folders without anything of loratune's."""
    is_cut: bool = False
    """Whether the search ended before it had seen all."""

    def run(self, name: str) -> RunSummary:
        """Return the run of a name.

        Raises:
            LoratuneError: none has it.
        """
        for run in self.runs:
            if run.name == name:
                return run
        raise LoratuneError(f"there is no run {name}", Exit.MODEL)

    def evaluations_of(self, run: RunSummary) -> list[EvaluationSummary]:
        """Return the evaluations of a run's present adapter, the newest first."""
        found = self._by_digest.get(run.digest, []) if run.digest else []
        return sorted(found, key=lambda one: one.time or "", reverse=True)

    def models_of(self, run: RunSummary) -> list[ModelSummary]:
        """Return the merged models and exports of a run's present adapter."""
        return self._by_weights.get(run.weights_sha256, []) if run.weights_sha256 else []

    def runs_of(self, model: ModelSummary) -> list[RunSummary]:
        """Return the runs whose adapters are in a model."""
        return [run for run in self.runs if run.weights_sha256 in model.adapters]

    @cached_property
    def _by_digest(self) -> dict[str | None, list[EvaluationSummary]]:
        return _grouped((one.digest, one) for one in self.evaluations)

    @cached_property
    def _by_weights(self) -> dict[str, list[ModelSummary]]:
        return _grouped((sha256, model) for model in self.models for sha256 in model.adapters)

    def values(self) -> dict[str, Any]:
        """Return everything in JSON types."""
        return {
            "runs": [self.run_values(run) for run in self.runs],
            "models": [model_values(one) | {"runs": [run.name for run in self.runs_of(one)]} for one in self.models],
            "evaluations": [evaluation_values(one) for one in self.evaluations],
            "foreign": self.foreign,
            "is_cut": self.is_cut,
        }

    def run_values(self, run: RunSummary) -> dict[str, Any]:
        """Return a run with its evaluations and models, in JSON types."""
        values = {name: value for name, value in asdict(run).items() if name != "digest"}
        evaluations = [evaluation_values(one) for one in self.evaluations_of(run)]
        models = [model_values(one, run) for one in self.models_of(run)]
        told = {"folder": str(run.folder), "rows": run.rows}
        return {**values, **told, "evaluations": evaluations, "models": models}


def evaluation_values(one: EvaluationSummary) -> dict[str, Any]:
    """Return an evaluation's verdict and tasks, in JSON types."""
    result = one.result
    shown = ("verdict", "sentence", "objection", "fallen", "baseline", "tests")
    told = {name: getattr(result, name) if result else None for name in shown}
    tasks = [task.name for task in one.benchmarks.tasks] if one.benchmarks else []
    place = {"name": one.name, "folder": str(one.folder), "time": one.time}
    return {**place, **told, "tasks": tasks, "problems": one.problems}


def model_values(model: ModelSummary, run: RunSummary | None = None) -> dict[str, Any]:
    """Return a model in JSON types, with whether its base is that of a run."""
    values = asdict(model) | {"folder": str(model.folder)}
    if run is None:
        return values
    both = model.base_sha256 and run.base_sha256
    return values | {"has_base_of_run": model.base_sha256 == run.base_sha256 if both else None}


class Search:
    """Searches a folder again and again; only what has changed is read again.

    Args:
        folder: the folder.
        kinds: what to look for; default is everything.
        depth: number of levels of folders that are looked into.

    Raises:
        LoratuneError: there is no such folder.
    """

    def __init__(
        self, folder: Path, kinds: Iterable[Kind] = ("run", "model", "evaluation"), depth: int = DEPTH
    ) -> None:
        require_folder(folder, "a folder of runs")
        self.folder, self.kinds, self.depth = folder, frozenset(kinds), depth
        self._known: dict[Place, tuple[object, Summary | None]] = {}
        self._lock = threading.Lock()

    def find(self) -> Found:
        """Return what is there now."""
        with self._lock:
            walk = Walk(self.folder, self.depth)
            places = [place for place in walk.places if place.kind in self.kinds]
            summaries = [self._summary(place) for place in places]
            self._known = {place: self._known[place] for place in places}
        runs = [one for one in summaries if isinstance(one, RunSummary)]
        return Found(
            tuple(sorted(runs, key=lambda run: run.time or "", reverse=True)),
            tuple(one for one in summaries if isinstance(one, ModelSummary)),
            tuple(one for one in summaries if isinstance(one, EvaluationSummary)),
            tuple(walk.foreign),
            walk.is_cut,
        )

    def _summary(self, place: Place) -> Summary | None:
        state = tuple(_identity(place.folder / name) for name in READ)
        before, known = self._known.get(place, (None, None))
        if before != state or (isinstance(known, RunSummary) and known.state in PASSING):
            known = SUMMARISE[place.kind](place)
            self._known[place] = state, known
        return known


def _identity(path: Path) -> tuple[int, ...] | None:
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size, about.st_ino


def _grouped(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups
