"""Keeps the newest checkpoints and the best one, and stops early."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from loratune import console
from loratune.errors import Exit, LoratuneError, counted
from loratune.recipe.sections import CheckpointSettings, EvaluationSettings
from loratune.runs.checkpoint import checkpoint_steps, open_checkpoint, step_folder
from loratune.runs.folder import CHECKPOINTS
from loratune.training.checkpoints.best import Validation, rank
from loratune.training.checkpoints.resuming import BEST_EXACT, stays_stopped
from loratune.writing import remove


def check_room(output: Path, settings: CheckpointSettings, adapter_bytes: int) -> None:
    """Check that the disk has room for the retained checkpoints and the adapter.

    Args:
        output: run folder.
        settings: how many checkpoints to keep.
        adapter_bytes: size of the trained weights; a checkpoint also has AdamW's two averages of each.

    Raises:
        LoratuneError: there is not enough room.
    """
    checkpoints = settings.keep + settings.keep_best + 1  # the new one is written before the oldest is removed
    needed = (3 * checkpoints + 1) * adapter_bytes
    free = shutil.disk_usage(output).free
    if free < needed:
        raise LoratuneError(
            f"{output}: {counted(checkpoints, 'checkpoint')} and the adapter take {console.memory(needed)}, "
            f"{console.memory(free)} are free; make room, lower checkpoints.keep, or choose another --output",
            Exit.IO,
        )


class CheckpointKeeper(TrainerCallback):
    """Tracks the best validation, removes old checkpoints, and stops early if configured."""

    def __init__(self, run: Path, checkpoints: CheckpointSettings, evaluation: EvaluationSettings) -> None:
        self.folder = run / CHECKPOINTS
        self.settings = checkpoints
        self.patience = evaluation.early_stopping
        self.best_by = checkpoints.best_by
        self.best: Validation | None = None
        self.validations_since_best = 0
        self.stopped_early = False

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """Record a new best and save it; the untrained adapter of step 0 does not count."""
        if state.global_step == 0:
            return
        newest = Validation(state.global_step, metrics["eval_loss"], metrics["eval_exact_answers"])
        if self.best is None or rank(newest, self.best_by) > rank(self.best, self.best_by):
            self.best = newest
            self.validations_since_best = 0
            control.should_save = control.should_save or self.settings.keep_best
        else:
            self.validations_since_best += 1
        if self.patience is not None and self.validations_since_best >= self.patience:
            self.stopped_early = not control.should_training_stop
            control.should_training_stop = control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remove the oldest checkpoints, after the new one was renamed and verified."""
        if not state.is_world_process_zero:
            return
        open_checkpoint(step_folder(self.folder, state.global_step))
        steps = checkpoint_steps(self.folder)
        keep = set(steps[-self.settings.keep :])
        if self.settings.keep_best and self.best is not None:
            keep.add(self.best.step)
        for step in steps:
            if step not in keep:
                remove(step_folder(self.folder, step))

    @property
    def progress(self) -> dict[str, Any]:
        """State for checkpoints."""
        progress = {
            "best_step": self.best.step if self.best else None,
            "best_loss": self.best.loss if self.best else None,
            "validations_since_best": self.validations_since_best,
            "stopped_early": self.stopped_early,
        }
        if self.best_by != self.settings.best_by:  # restored without exact answers: the next resume does the same
            return progress
        return progress | {BEST_EXACT: self.best.exact if self.best else None}

    def restore(self, progress: dict[str, Any]) -> None:
        """Restore the state of a checkpoint. A run of a version that counted no exact answers goes on without."""
        if BEST_EXACT not in progress and self.best_by == "auto":
            self.best_by = "loss"
        if progress["best_step"] is not None:
            self.best = Validation(progress["best_step"], progress["best_loss"], progress.get(BEST_EXACT))
        self.validations_since_best = progress["validations_since_best"]
        self.stopped_early = stays_stopped(progress, self.patience)

    @property
    def best_checkpoint(self) -> Path | None:
        """The checkpoint of the final adapter; None for the last step."""
        if not self.settings.keep_best or self.best is None:
            return None
        return step_folder(self.folder, self.best.step)
