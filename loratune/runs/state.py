"""How a run stands: running, interrupted, crashed, diverged, failed, or finished."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from loratune.errors import Exit, LoratuneError
from loratune.runs.checkpoint import checkpoint_steps
from loratune.runs.folder import CHECKPOINTS, RECIPE, STATUS, read_json, read_metrics
from loratune.runs.lock import lock_holder


def run_state(output: Path) -> dict[str, Any]:
    """What is known of a run without reading a weight.

    Args:
        output: its folder.

    Returns:
        output, state, step, steps, loss, validation_loss, best_validation_loss (None where there is none), checkpoints
        (steps), time (of the last change of state), next (what to type, or None).

    Raises:
        LoratuneError: the folder holds no run.
    """
    if not (output / STATUS).is_file():
        raise LoratuneError(f"{output} holds no run (no {STATUS} in it)", Exit.MODEL)
    status = read_json(output / STATUS)
    records = read_metrics(output)
    state = status.get("state", "unknown")
    if state == "running" and lock_holder(output) is None:
        state = "crashed"
    losses = [record["loss"] for record in records if "loss" in record]
    validations = [record["validation_loss"] for record in records if "validation_loss" in record]
    steps = checkpoint_steps(output / CHECKPOINTS)
    return {
        "output": str(output),
        "state": state,
        "step": status.get("step", max((int(record["step"]) for record in records), default=0)),
        "steps": status.get("steps"),
        "loss": losses[-1] if losses else None,
        "validation_loss": validations[-1] if validations else None,
        "best_validation_loss": min(validations, default=None),
        "checkpoints": steps,
        "time": status.get("time"),
        "next": _next(output, state, bool(steps)),
    }


def _next(output: Path, state: str, has_checkpoint: bool) -> str | None:
    if state == "running":
        return None
    if state == "finished":
        return f"loratune infer --adapter {shlex.quote(str(output))}"
    recipe = shlex.quote(str(output / RECIPE))
    if state == "diverged":
        return f"loratune sft --config {recipe} --overwrite --training.learning_rate …  (a lower one)"
    return f"loratune sft --config {recipe} {'--resume' if has_checkpoint else '--overwrite'}"
