"""The layout of what `loratune runs list` and `runs show` print with --json, for its JSON Schema."""

from __future__ import annotations

from typing import Annotated

from typing_extensions import NotRequired, TypedDict

from loratune.board.summary import ModelSummary, RunSummary
from loratune.runs.manifest import TrainedFile
from loratune.runs.state import RunState
from loratune.runs.typed_json import WRITTEN_BESIDE


class EvaluationValues(TypedDict):
    """The verdict of an evaluation; null where it cannot be read."""

    name: str
    folder: str
    time: str | None
    verdict: str | None
    sentence: str | None
    objection: str | None
    """What other measures say where the deciding one says otherwise; empty if none does."""
    fallen: dict[str, str] | None
    """Measure that is worse without any decision that says so → a sentence about it."""
    baseline: str | None
    tests: str | None
    tasks: list[str]
    """Names of the benchmark tasks that were asked."""
    problems: list[str]


class ModelValues(TypedDict):
    """A merged model or an export."""

    model: Annotated[ModelSummary, WRITTEN_BESIDE]
    runs: NotRequired[list[str]]
    """Names of the runs whose adapters are in it; in lists of models."""
    has_base_of_run: NotRequired[bool | None]
    """Null where it is not known; beside a run."""


class RunValues(TypedDict):
    """A run, with what was made of it."""

    run: Annotated[RunSummary, WRITTEN_BESIDE]
    rows: int | None
    """That were used, of training and validation."""
    evaluations: list[EvaluationValues]
    models: list[ModelValues]


class FolderValues(TypedDict):
    """What is below a folder."""

    folder: str
    runs: list[RunValues]
    models: list[ModelValues]
    evaluations: list[EvaluationValues]
    foreign: list[str]
    """Folders without anything of loratune's."""
    is_cut: bool
    """Whether the search ended before it had seen all."""


class RunsList(TypedDict):
    """The folders that were searched."""

    folders: list[FolderValues]


class FileNow(TypedDict):
    """A file of rows, as it was in training."""

    file: Annotated[TrainedFile, WRITTEN_BESIDE]
    now: str
    """Whether it is still there and unchanged."""


class Lineage(TypedDict):
    """What a run was made from, and what was made of it."""

    tags: list[str]
    data: list[FileNow]
    evaluations: list[EvaluationValues]
    models: list[ModelValues]


class ShownRun(RunState, Lineage):
    """The state of a run, what it was made from, and what was made of it."""


class ShownModel(TypedDict):
    """Where a merged model or an export comes from."""

    output: str
    kind: str
    base: str | None
    base_sha256: str | None
    adapters: list[str]
    """sha256 of the weights of each adapter in it."""
    runs: list[str]
    """Names of their runs, as far as they lie beside it."""
    origin: str
    verified: str | None
    """What was compared with base + adapter; of merged models."""
    time: str | None
    changed: list[str] | None
    """Files that have changed; null where no hashes were recorded."""
