"""What a list says of a run, a model or an evaluation, from its small JSON files; damage is told, never raised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field

from loratune.board.walk import Place, folder_bytes
from loratune.errors import LoratuneError
from loratune.evaluation.result import RESULT, RESULTS, Evaluation, read_evaluation
from loratune.evaluation.tasks.result import TASKS_RESULT, TasksResult, read_tasks
from loratune.generation.batch.answer_header import is_answer_file
from loratune.plain_files import is_file
from loratune.runs.file_hashes import Records
from loratune.runs.fingerprint import FULL
from loratune.runs.folder import REPORT, VERIFICATION, newest_metrics, trained_steps
from loratune.runs.going_on import state_now
from loratune.runs.lineage import merged_weights, sealed_digest, sealed_weights
from loratune.runs.manifest import Manifest, TrainedFile, read_manifest
from loratune.runs.report import Report, read_report
from loratune.runs.status import Status, read_status
from loratune.runs.tags import read_tags
from loratune.runs.verification import AnyVerification, ExportedFolder, MergedModel, read_verification

DAMAGED = "damaged"
"""State of a run whose status cannot be read."""
UNFINISHED = "not finished; loratune eval is writing it, or goes on with it when called again"
"""Problem of an evaluation without a result."""
Value = TypeVar("Value")


@dataclass(frozen=True)
class RunSummary:
    """A run; what is not known is None."""

    name: str
    folder: Path
    state: str
    time: str | None
    """Of the last change of state, ISO 8601."""
    step: int | None
    steps: int | None
    base: str | None
    base_sha256: str | None
    """Of all its tensors."""
    data: tuple[TrainedFile, ...]
    loss: float | None
    """Training loss in nats per token, of the newest steps."""
    validation_loss: float | None
    """Of the adapter that was kept, or of the newest validation; None until the adapter has been validated."""
    exact_answers: float | None
    """Share."""
    bytes: int
    tags: tuple[str, ...]
    weights_sha256: str | None
    """Of the adapter's weights."""
    digest: Annotated[str | None, Field(exclude=True)]
    """Of the adapter's folder, as evaluations record it."""
    changed: tuple[str, ...]
    """Files that are missing or have another size than the run left them with."""
    problems: tuple[str, ...]

    @property
    def rows(self) -> int | None:
        """Rows that were used, of training and validation."""
        return sum(file.rows for file in self.data) if self.data else None


@dataclass(frozen=True)
class ModelSummary:
    """A merged model or an export."""

    name: str
    folder: Path
    kind: str
    """`merged model`, `export gguf` and so on."""
    time: str | None
    base: str | None
    base_sha256: str | None
    adapters: tuple[str, ...]
    """sha256 of the weights of each adapter in it."""
    verified: str | None
    """What was compared with base + adapter; of merged models."""
    bytes: int
    changed: tuple[str, ...]
    """As of a run."""
    problems: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationSummary:
    """An evaluation."""

    name: str
    folder: Path
    time: str | None
    result: Evaluation | None
    """None if it cannot be read."""
    digest: str | None
    """Of the adapter that was evaluated."""
    benchmarks: TasksResult | None
    """None if no tasks were asked, or their scores cannot be read."""
    problems: tuple[str, ...]


class _Reading:
    """Reads files, and keeps what is wrong with them."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def attempt(self, read: Callable[[], Value]) -> Value | None:
        try:
            return read()
        except (LoratuneError, OSError) as error:
            self.problems.append(" ".join(str(error).split()))
            return None


def summarise_run(place: Place) -> RunSummary:
    """Return what a list says of a run."""
    folder, reading = place.folder, _Reading()
    status = reading.attempt(lambda: read_status(folder))
    manifest = reading.attempt(lambda: read_manifest(folder)) or Manifest()
    state = state_now(folder, status) if status else DAMAGED
    has_report = state == "finished" and is_file(folder / REPORT)
    report = reading.attempt(lambda: read_report(folder)) if has_report else None
    return RunSummary(
        name=place.name,
        folder=folder,
        state=state,
        time=status.time if status else None,
        base=manifest.base.name if manifest.base else None,
        base_sha256=(manifest.base.hashes if manifest.base else {}).get(FULL),
        data=manifest.data,
        bytes=folder_bytes(folder),
        tags=reading.attempt(lambda: read_tags(folder)) or (),
        weights_sha256=sealed_weights(manifest),
        digest=sealed_digest(manifest),
        changed=_of_other_size(folder, manifest.files or {}),
        problems=tuple(reading.problems),
        **(_figures_of(report, status) if report else _newest_figures(folder, status)),
    )


def _figures_of(report: Report, status: Status | None) -> dict[str, Any]:
    return {
        "step": report.steps,
        "steps": status.steps if status else None,
        "loss": report.loss.last if report.loss else None,
        "validation_loss": report.validation_loss.after if report.validation_loss else None,
        "exact_answers": report.exact_answers.after if report.exact_answers else None,
    }


def _newest_figures(folder: Path, status: Status | None) -> dict[str, Any]:
    records = trained_steps(newest_metrics(folder))
    newest = {name: value for record in records for name, value in record.items()}
    names = ("loss", "validation_loss", "exact_answers")
    step = status.step if status and status.step is not None else int(newest.get("step", 0))
    return {"step": step, "steps": status.steps if status else None, **{name: newest.get(name) for name in names}}


def summarise_model(place: Place) -> ModelSummary | None:
    """Return what a list says of a merged model or an export; None for another program's verification.json."""
    folder, reading = place.folder, _Reading()
    verification = reading.attempt(lambda: read_verification(folder))
    if verification is None and not reading.problems:
        return None
    proved = verification.proved if verification else None
    merged = proved if isinstance(proved, MergedModel) else None
    return ModelSummary(
        name=place.name,
        folder=folder,
        kind=_kind_of(verification),
        time=_written(folder / VERIFICATION),
        base=merged.base if merged else None,
        base_sha256=proved.base_sha256 if proved else None,
        adapters=merged_weights(proved) if proved else (),
        verified=merged.models.verified if merged else None,
        bytes=folder_bytes(folder),
        changed=_of_other_size(folder, (verification.files if verification else None) or {}),
        problems=tuple(reading.problems),
    )


def _kind_of(verification: AnyVerification | None) -> str:
    if verification is None:
        return f"{DAMAGED} model"
    proved = verification.proved
    return f"export {proved.format}" if isinstance(proved, ExportedFolder) else verification.kind


def summarise_evaluation(place: Place) -> EvaluationSummary | None:
    """Return what a list says of an evaluation, of rows or tasks; None for another program's results.jsonl."""
    folder, reading = place.folder, _Reading()
    benchmarks = reading.attempt(lambda: read_tasks(folder)) if is_file(folder / TASKS_RESULT) else None
    result, time = None, _written(folder / RESULT) or _written(folder / TASKS_RESULT)
    if is_file(folder / RESULT):
        result = reading.attempt(lambda: read_evaluation(folder))
    elif is_answer_file(folder / RESULTS):
        time, reading.problems = None, [UNFINISHED]
    elif not is_file(folder / TASKS_RESULT):
        return None
    digest = result.inputs.get("adapter") if result else None
    return EvaluationSummary(place.name, folder, time, result, digest, benchmarks, tuple(reading.problems))


def _of_other_size(folder: Path, records: Records) -> tuple[str, ...]:
    """Return the recorded files that are missing or have another size; a change of equal size shows in the hash."""
    return tuple(name for name, record in records.items() if _size(folder / name) != record.get("bytes"))


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _written(path: Path) -> str | None:
    try:
        return datetime.fromtimestamp(path.stat().st_mtime, timezone.utc).isoformat(timespec="seconds")
    except OSError:
        return None
