"""How a run goes on: its state, the command that is next, and what can be used of it while it trains."""

from __future__ import annotations

from pathlib import Path

from loratune.commands import Command, loratune
from loratune.errors import LoratuneError
from loratune.runs.checkpoint import checkpoint_steps, step_folder
from loratune.runs.folder import CHECKPOINTS, RECIPE
from loratune.runs.lock import lock_holder
from loratune.runs.manifest import read_manifest, run_record
from loratune.runs.status import Status

LOWER = 3
"""Divisor of a learning rate that diverged."""


def state_now(output: Path, status: Status) -> str:
    """Return a run's state; a run that is marked as running and has no process has crashed."""
    return "crashed" if status.state == "running" and lock_holder(output) is None else status.state


def next_command(output: Path, state: str) -> Command | None:
    """Return the next command; None while the run is in progress.

    Args:
        output: run folder.
        state: state of the run.
    """
    if state == "running":
        return None
    if state == "finished":
        return loratune("next", "infer", {"--adapter": output})
    flags: dict[str, object] = {"--config": output / RECIPE, "--gpus": _gpus(output)}
    if state == "diverged":
        rate = run_record(output, read_manifest(output)).learning_rate
        lower = {"--overwrite": True, "--training.learning_rate": f"{rate / LOWER:.3g}"}
        return loratune("start anew with a lower learning rate", "sft", flags | lower)
    if checkpoint_steps(output / CHECKPOINTS):
        return loratune("go on with", "sft", flags | {"--resume": True})
    return loratune("no checkpoint was written; start anew with", "sft", flags | {"--overwrite": True})


def _gpus(output: Path) -> int | None:
    """Return the number of a run's `--gpus`; None without it, and where the manifest cannot be read."""
    try:
        count = read_manifest(output).gpus
    except LoratuneError:
        return None
    return count if count > 1 else None


def following_command(output: Path) -> Command:
    """Return the command that shows how far a run has come."""
    return Command("see how far it is", ("loratune", "runs", "show", str(output)))


def newest_checkpoint(output: Path) -> Path | None:
    """Return the newest checkpoint of a run, which has its name once it is whole; None without one."""
    steps = checkpoint_steps(output / CHECKPOINTS)
    return step_folder(output / CHECKPOINTS, steps[-1]) if steps else None
