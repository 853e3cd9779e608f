"""The state of a run: running, interrupted, crashed, diverged, failed, or finished."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from loratune.choices import BaseChecked
from loratune.commands import Command, free_place, loratune
from loratune.errors import LoratuneError
from loratune.extras import FOR_EVALUATION, first_install
from loratune.recipe.advice import is_served
from loratune.runs.base_check import how_checked
from loratune.runs.checkpoint import checkpoint_steps
from loratune.runs.folder import ADAPTER, CHECKPOINTS, MANIFEST, read_metrics, trained_steps
from loratune.runs.going_on import next_command, state_now
from loratune.runs.manifest import read_manifest, run_record
from loratune.runs.seals import ALL_SEALED, TO_PROMPT, changed_files
from loratune.runs.status import read_status, require_run


class RunState(TypedDict):
    """The state of a run."""

    output: str
    state: str
    """running, interrupted, crashed, diverged, failed, or finished."""
    step: int
    steps: int | None
    loss: float | None
    """The newest training loss, in nats per answer token."""
    validation_loss: float | None
    best_validation_loss: float | None
    exact_answers: float | None
    """Share of the validation answers; null if they were not counted."""
    best_exact_answers: float | None
    seconds_left: float | None
    """Of training, at the rate so far; null if nothing is to be expected."""
    checkpoints: list[int]
    """Their steps."""
    time: str | None
    """Of the last change of state."""
    base_checked: BaseChecked
    """How much of the base's weights later commands compare."""
    changed: list[str]
    """Files that differ from their hashes; commands that read them refuse the run."""
    next: str | None
    """The next command."""


def run_state(output: Path) -> RunState:
    """Return the state of a run without reading weights.

    Args:
        output: run folder.

    Raises:
        LoratuneError: the folder is not a run, or its status is damaged.
    """
    require_run(output)
    status = read_status(output)
    records, state = read_metrics(output), state_now(output, status)
    losses, validations, exact = (
        [record[name] for record in trained_steps(records) if name in record]
        for name in ("loss", "validation_loss", "exact_answers")
    )
    steps = checkpoint_steps(output / CHECKPOINTS)
    advised = next_command(output, state)
    return {
        "output": str(output),
        "state": state,
        "step": max((int(record["step"]) for record in records), default=0) if status.step is None else status.step,
        "steps": status.steps,
        "loss": losses[-1] if losses else None,
        "validation_loss": validations[-1] if validations else None,
        "best_validation_loss": min(validations, default=None),
        "exact_answers": exact[-1] if exact else None,
        "best_exact_answers": max(exact, default=None),
        "seconds_left": _seconds_left(records, status.steps) if state == "running" else None,
        "checkpoints": steps,
        "time": status.time,
        **_seal(output),
        "next": advised.line if advised else None,
    }


def _seconds_left(records: list[dict[str, Any]], steps: int | None) -> float | None:
    """Return the expected time to the last step; None before the first step, and if the last is not known."""
    newest = records[-1] if records else {}
    step, seconds = newest.get("step"), newest.get("seconds")
    return round(seconds / step * (steps - step), 1) if step and seconds and steps else None


class _Seal(TypedDict):
    base_checked: BaseChecked
    changed: list[str]


def _seal(output: Path) -> _Seal:
    """Return which checks later commands can do on a run, and what they would find."""
    if not (output / MANIFEST).is_file():
        missing = [f"{MANIFEST} (missing)"] if (output / ADAPTER).is_dir() else []
        return {"base_checked": how_checked({}), "changed": missing}
    try:
        manifest = read_manifest(output)
        had_adapter = any(name.startswith(f"{ADAPTER}/") for name in manifest.files or {})
        is_ended = had_adapter or (output / ADAPTER).is_dir()
        changed = changed_files(output, manifest, ALL_SEALED if is_ended else TO_PROMPT)
    except LoratuneError as error:
        return {"base_checked": how_checked({}), "changed": [str(error)]}
    return {"base_checked": how_checked(manifest.base.hashes if manifest.base else {}), "changed": changed}


def evaluation_command(output: Path) -> Command:
    """Return the command that compares the adapter of a finished run with its base, and what it needs installed."""
    place = free_place(output, "-eval")
    flags = {"--adapter": output, "--tests": "TESTS", "--output": place}
    install = first_install(FOR_EVALUATION, "eval")
    purpose = f"is it better, after {install}" if install else "is it better"
    return loratune(purpose, "eval", flags, {"TESTS": "rows that it was not trained on"})


def merging_command(output: Path) -> Command:
    """Return the command that merges an adapter into its base."""
    return loratune("merge it", "merge", {"--adapter": output, "--output": free_place(output, "-merged")})


def serving_command(output: Path) -> Command | None:
    """Return the command that prepares the adapter of a finished run for vLLM, merged if vLLM cannot serve it.

    Args:
        output: run folder; None is returned if it is no longer there.
    """
    if not (output / MANIFEST).is_file():
        return None
    record = run_record(output, read_manifest(output))
    if not is_served(record.method, record.lora, "vllm"):
        return replace(merging_command(output), purpose="merge it, as vLLM serves this adapter only merged")
    place = free_place(output, "-vllm")
    return loratune("for vLLM", "export", {"--adapter": output, "--format": "vllm", "--output": place})
