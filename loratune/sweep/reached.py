"""What a trial's run folder says of how far it has come; it is the only contract between a training and the sweep."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

from loratune.errors import LoratuneError
from loratune.model.adapter.files import WEIGHTS_FILE
from loratune.runs.checkpoint import checkpoint_steps, step_folder
from loratune.runs.folder import ADAPTER, CHECKPOINTS, STATUS, read_metrics
from loratune.runs.report import read_report
from loratune.runs.status import read_status
from loratune.safetensors_header import count_values
from loratune.sweep.plan import Outcome
from loratune.training.steps import step_of


def reached(run: Path, share: Fraction, process_seconds: float = 0.0, peak: int | None = None) -> Outcome | None:
    """Return what a run has reached by a share of its steps; None if it has not come so far.

    Args:
        run: run folder.
        share: of the run's steps.
        process_seconds: of the process that has trained it.
        peak: its peak memory in bytes.

    Raises:
        LoratuneError: a file of the run is damaged.
    """
    if not (run / STATUS).is_file():
        return None
    status, records = read_status(run), read_metrics(run)
    if not records or status.steps is None:
        return None
    if status.state == "finished":
        report = read_report(run)
        if report.validation_loss is None:
            return None
        loss, seconds = report.validation_loss.after, report.seconds or records[-1]["seconds"]
        peak = report.peak_memory_bytes if peak is None else peak
        exact = report.exact_answers.after if report.exact_answers else None
        return Outcome(loss, report.steps, status.steps, seconds, process_seconds, peak, exact)
    step = step_of(share, status.steps)
    there = [record for record in records if record["step"] == step and "validation_loss" in record]
    if status.state != "interrupted" or not there or (status.step or 0) < (step or math.inf):
        return None
    newest = there[-1]
    loss, seconds, exact = newest["validation_loss"], newest["seconds"], newest.get("exact_answers")
    return Outcome(loss, int(newest["step"]), status.steps, seconds, process_seconds, peak, exact)


def adapter_size(run: Path) -> tuple[int, int] | None:
    """Return the parameters and the bytes of a run's newest adapter; None if it has none, or one that is damaged."""
    steps = checkpoint_steps(run / CHECKPOINTS)
    folders = [run / ADAPTER, *(step_folder(run / CHECKPOINTS, step) for step in reversed(steps))]
    path = next((folder / WEIGHTS_FILE for folder in folders if (folder / WEIGHTS_FILE).is_file()), None)
    if path is None:
        return None
    try:
        return count_values(path), path.stat().st_size
    except LoratuneError:
        return None
