"""From which data and adapter a folder was made, and what was made of it, as far as hashes tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loratune.board.opened import beside
from loratune.board.search import evaluation_values, model_values
from loratune.board.summary import ModelSummary, summarise_run
from loratune.board.table import origin_text
from loratune.board.walk import Place
from loratune.plain_files import is_file
from loratune.runs.intact import check_files
from loratune.runs.manifest import TrainedFile
from loratune.runs.remembered import remembered_sha256
from loratune.runs.verification import read_verification


def model_state(model: ModelSummary) -> dict[str, Any]:
    """Return where a model comes from and whether it is unchanged, in JSON types.

    Raises:
        LoratuneError: its verification.json is damaged, or a file cannot be read.
    """
    verification = read_verification(model.folder)
    check = check_files(model.folder, verification) if verification else None
    found = beside(model.folder, ("run",))
    return {
        "output": str(model.folder),
        "kind": model.kind,
        "base": model.base,
        "base_sha256": model.base_sha256,
        "adapters": model.adapters,
        "runs": [run.name for run in found.runs_of(model)],
        "origin": origin_text(found, model),
        "verified": model.verified,
        "time": model.time,
        "changed": None if check is None else check.lines(),
    }


def run_lineage(folder: Path) -> dict[str, Any]:
    """Return a run's tags, its data, and what was made of its adapter within and beside its folder, in JSON types."""
    found, run = beside(folder), summarise_run(Place(folder, str(folder), "run"))
    return {
        "tags": run.tags,
        "data": [{**vars(file), "now": _now(file)} for file in run.data],
        "evaluations": [evaluation_values(one) for one in found.evaluations_of(run)],
        "models": [model_values(one, run) for one in found.models_of(run)],
    }


def _now(file: TrainedFile) -> str:
    """Return whether a file of rows is still the one that was trained on."""
    if not is_file(file.path):
        return "not here"
    try:
        return "unchanged" if remembered_sha256(Path(file.path)) == file.sha256 else "changed since"
    except OSError:
        return "cannot be read"
