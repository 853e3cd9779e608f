"""Checks that all states in a checkpoint belong to its step, which most of them record.

Seals detect later changes; this check detects files of different steps that were sealed together.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import safe_globals

from loratune.errors import Exit, LoratuneError, bullet_list, first_line_of, reason_of
from loratune.runs.checkpoint import Checkpoint

OPTIMIZER, SCHEDULER, TRAINER_STATE, SCALER = "optimizer.pt", "scheduler.pt", "trainer_state.json", "scaler.pt"
SHAPE_ERRORS = (ValueError, KeyError, TypeError, AttributeError, IndexError)


def check_states(checkpoint: Checkpoint) -> None:
    """Compare the step counts of optimizer, scheduler and trainer with the seal's step.

    Pickles are loaded with weights_only: a pickle that needs anything else counts as damaged and is not run.

    Raises:
        LoratuneError: lists every file that is unreadable or of another step.
    """
    problems = [problem for read in (_trainer, _optimizer, _scheduler) if (problem := read(checkpoint))]
    problems += [problem for path in sorted(checkpoint.folder.glob("rng_state*.pth")) if (problem := _random(path))]
    if problems:
        raise LoratuneError(f"{checkpoint.folder}: damaged\n{bullet_list(problems)}", Exit.MODEL)


@contextmanager
def state_errors_explained(folder: Path) -> Iterator[None]:
    """Turn errors from states of another shape than this run's into one message.

    Raises:
        LoratuneError: a state does not fit.
    """
    try:
        yield
    except SHAPE_ERRORS as error:
        raise LoratuneError(
            f"{folder}: its states do not fit this run: {reason_of(error, 200)}; resume from an earlier "
            "checkpoint with --resume STEP, or start anew with --overwrite",
            Exit.MODEL,
        ) from error


def _trainer(checkpoint: Checkpoint) -> str | None:
    try:
        step = TrainerState.load_from_json(str(checkpoint.folder / TRAINER_STATE)).global_step
        if not isinstance(step, int):
            raise TypeError(f"global_step is {step!r}")
    except (OSError, *SHAPE_ERRORS) as error:
        return f"{TRAINER_STATE} cannot be read: {first_line_of(error, 120)}"
    return _of_another_step(TRAINER_STATE, step, checkpoint.step, checkpoint.step)


def _optimizer(checkpoint: Checkpoint) -> str | None:
    try:
        states = _read(checkpoint.folder / OPTIMIZER)["state"].values()
        step = max(int(state["step"]) for state in states)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, *SHAPE_ERRORS) as error:
        return f"{OPTIMIZER} cannot be read: {first_line_of(error, 120)}"
    return _of_another_step(OPTIMIZER, step, _fewest(checkpoint), checkpoint.step)


def _scheduler(checkpoint: Checkpoint) -> str | None:
    try:
        step = int(_read(checkpoint.folder / SCHEDULER)["last_epoch"])
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, *SHAPE_ERRORS) as error:
        return f"{SCHEDULER} cannot be read: {first_line_of(error, 120)}"
    return _of_another_step(SCHEDULER, step, _fewest(checkpoint), checkpoint.step)


def _random(path: Path) -> str | None:
    try:
        with safe_globals():
            state = _read(path)
        missing = {"python", "numpy", "cpu"} - state.keys()
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, *SHAPE_ERRORS) as error:
        return f"{path.name} cannot be read: {first_line_of(error, 120)}"
    return f"{path.name} holds no state of {', '.join(sorted(missing))}" if missing else None


def _read(path: Path) -> Any:
    """Load a state's dictionary; its tensors stay memory-mapped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about pickles that it then rejects
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _fewest(checkpoint: Checkpoint) -> int:
    """Return the minimum number of updates; with float16, steps whose gradients overflow are skipped."""
    return 0 if (checkpoint.folder / SCALER).is_file() else checkpoint.step


def _of_another_step(name: str, found: int, fewest: int, step: int) -> str | None:
    return None if fewest <= found <= step else f"{name} is of step {found}, the checkpoint of step {step}"


@contextmanager
def settings_kept(optimizer: Any, schedule: Any) -> Iterator[None]:
    """Keep the settings of the recipe while the states of an optimizer and a LambdaLR are loaded from a checkpoint.

    Args:
        optimizer: the optimizer; None if nothing is loaded.
        schedule: its schedule.
    """
    if optimizer is None:
        yield
        return
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    yield
    schedule.base_lrs = [group["initial_lr"] for group in settings]
    factors = (factor(schedule.last_epoch) for factor in schedule.lr_lambdas)
    schedule._last_lr = [rate * factor for rate, factor in zip(schedule.base_lrs, factors, strict=True)]
    for group, own, rate in zip(optimizer.param_groups, settings, schedule._last_lr, strict=True):
        group.update(own | {"lr": rate})
