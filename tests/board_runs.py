"""Run folders as training leaves them, written by its own functions, without a model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratune.evaluation.result import Decision, Evaluation, write_evaluation
from loratune.recipe.loading import load_recipe
from loratune.runs.data_findings import DataFinding, save_findings
from loratune.runs.intact import recorded_files
from loratune.runs.lineage import adapter_digest
from loratune.runs.manifest import Manifest, TrainedBase, TrainedFile, read_manifest
from loratune.runs.output import begin_run, seal_run
from loratune.runs.record import RunRecord
from loratune.runs.report import Answers, ExactAnswers, Health, Losses, Report, RowCounts, Told, write_report
from loratune.runs.status import set_status
from loratune.runs.verification import MergedModel, ModelProof, write_verification

BASE_SHA256 = "b" * 64
ROWS_SHA256 = "d" * 64
METRICS = (
    {"step": 0, "validation_loss": 2.5, "exact_answers": 0.0, "seconds": 0.1},
    {"step": 2, "loss": 2.0, "learning_rate": 1e-4, "tokens_per_second": 100.0, "seconds": 1.0},
    {"step": 4, "loss": 1.0, "learning_rate": 1e-5, "tokens_per_second": 100.0, "seconds": 2.0},
    {"step": 4, "validation_loss": 1.5, "exact_answers": 0.5, "seconds": 2.1},
)
FINDING = DataFinding("short", "warn", 2, "2 of 12 training rows have short answers:\n  rows.json, row 3 «Who?»")
FALL = "sound answers fell from 100.0% to 88.9%"
OBJECTION = "no answer is word for word the expected one"
TOLD = Told("Who are you?", "I am Robin.", "I am a model.", "I am Robin!", True, True)


def make_run(
    output: Path,
    state: str = "finished",
    *,
    settings: Mapping[str, Any] | None = None,
    data: Sequence[TrainedFile] = (TrainedFile("in/rows.json", ROWS_SHA256, 12, 12, "alpaca"),),
    metrics: Sequence[Mapping[str, float]] = METRICS,
    weights: bytes = b"weights",
    told: Sequence[Told] = (TOLD,),
) -> Path:
    """Make a run folder in a state; without an adapter and a report unless it is finished."""
    recipe = load_recipe(None, {"model.base": "org/base", "data.train": ["in/rows.json"], **(settings or {})})
    recipe = recipe.model_copy(update={"output": str(output)})
    base = TrainedBase(recipe.model.base, "/models/base", {"tensors_sha256": BASE_SHA256, "tensors": {}})
    begin_run(output, recipe, Manifest(base, data=tuple(data), record=RunRecord.of(recipe)), steps=4)
    save_findings(output, [FINDING])
    (output / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in metrics), encoding="utf-8")
    if state == "finished":
        write_adapter(output, weights)
        answers = Health(answers=Answers(tuple(told)), sentences=("Look at the answers.",))
        report = Report(str(output), recipe.model.base, 4, 1.0, rows=RowCounts(10, 2), loss=Losses(2.0, 1.0))
        exact = ExactAnswers(2, 0.0, 0.5, 0.5, 4)
        write_report(output, replace(report, exact_answers=exact, seconds=2.5, peak_memory_bytes=7, health=answers))
        seal_run(output)
    if state != "running":
        set_status(output, state, step=4 if state == "finished" else 3, steps=4)
    return output


def write_adapter(output: Path, weights: bytes) -> None:
    (output / "adapter").mkdir(exist_ok=True)
    (output / "adapter" / "adapter_model.safetensors").write_bytes(weights)
    (output / "adapter" / "adapter_config.json").write_text("{}")


def make_model(folder: Path, run: Path, base_sha256: str | None = BASE_SHA256) -> Path:
    """Make the folder of a merged model of a run."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    files = read_manifest(run).files or {}
    sha256 = str(files["adapter/adapter_model.safetensors"]["sha256"])
    merged = MergedModel("org/base", base_sha256=base_sha256, adapter_sha256=sha256, models=ModelProof("files"))
    write_verification(folder, merged, recorded_files(folder))
    return folder


def make_evaluation(folder: Path, run: Path, verdict: Any = "better", why: str = "loss 2.0 → 1.0") -> Path:
    """Make the folder of an evaluation of a run, with a measure that has fallen, and an objection."""
    folder.mkdir(parents=True)
    files = read_manifest(run).files or {}
    hashes = {name[8:]: str(one["sha256"]) for name, one in files.items() if name.startswith("adapter/")}
    decisions = (Decision("rows", verdict, why),)
    told = (str(run), "base", "org/base", "tests.json", 9, 9, "loss", verdict, "better on 9 of 9 rows", decisions)
    inputs = {"adapter": adapter_digest(hashes)}
    write_evaluation(folder, Evaluation(*told, objection=OBJECTION, fallen={"form": FALL}, inputs=inputs))
    return folder
