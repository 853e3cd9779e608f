"""Callbacks at each logged step: metrics.jsonl, the progress bar, and the stop on divergence."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from loratune import console
from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.model.hardware import Hardware
from loratune.model.memory import peak_memory_bytes
from loratune.progress import StepProgress
from loratune.runs.folder import METRICS, read_metrics
from loratune.runtime import is_main_process
from loratune.writing import append_text, write_text

if TYPE_CHECKING:
    from loratune.training.trainer import AdapterTrainer

SHOWN_ROWS = 8
MOST_SKIPPED = 20
"""Steps in a row that float16's scaler may skip: it begins at 2¹⁶ and halves its scale each time."""
ZERO_REASONS = {
    "loss": "the loss is exactly 0: the model already predicts every answer with certainty, so nothing is left to "
    "learn: use fewer epochs, or other rows",
    "grad_norm": "the gradient is exactly 0, so nothing is learnt: either no trained weight affects the loss, or the "
    "loss was lost to rounding; model.dtype float32 shows which",
}


class Metrics(TrainerCallback):
    """Collects one record per logged step and per validation, and appends each to metrics.jsonl.

    A training record has step, epoch, loss (nats per trained token, mean over the logged steps), learning_rate,
    gradient_norm (before clipping), tokens (total, without padding), tokens_per_second (since the previous record) and
    seconds (since the start). A validation record has step, epoch, validation_loss, exact_answers (share),
    answers (their number) and seconds.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / METRICS
        self.records: list[dict[str, float]] = []
        self._start = 0.0
        self._elapsed = 0.0  # seconds before this process
        self._last = (0.0, 0.0)  # seconds and tokens at the previous record
        self._validating_seconds = 0.0

    def restore(self, step: int, progress: dict[str, float]) -> None:
        """Continue after a step: drop later records, an incomplete last line, and a validation that is made again.

        Args:
            step: step of the checkpoint.
            progress: `progress` at that step.
        """
        end = step if progress["validation_is_due"] else step + 1
        records = read_metrics(self.path.parent)
        self.records = [one for one in records if one["step"] < (end if "validation_loss" in one else step + 1)]
        if is_main_process():
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in self.records))
        self._elapsed = progress["seconds"]
        self._last = (progress["logged_seconds"], progress["logged_tokens"])
        self._validating_seconds = progress["validating_seconds"]

    @property
    def progress(self) -> dict[str, float]:
        """State for checkpoints."""
        return {
            "seconds": self.seconds,
            "validating_seconds": self._validating_seconds,
            "logged_seconds": self._last[0],
            "logged_tokens": self._last[1],
        }

    @property
    def seconds(self) -> float:
        """Seconds since the start, without the time between interruption and resumption."""
        return self._elapsed + time.perf_counter() - self._start

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log the last step too, so that the report covers the whole run."""
        control.should_log = control.should_log or state.global_step >= state.max_steps

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Convert the trainer's log into a record."""
        seconds = self.seconds
        record: dict[str, float] = {"step": state.global_step, "epoch": round(state.epoch or 0, 4)}
        if "eval_loss" in logs:
            self._validating_seconds += logs["eval_runtime"]
            record["validation_loss"] = logs["eval_loss"]
            record |= {name: logs[f"eval_{name}"] for name in ("exact_answers", "answers")}
        elif "loss" in logs:
            record |= self._training_record(logs, seconds - self._validating_seconds)
        else:
            return
        record["seconds"] = round(seconds, 3)
        self.records.append(record)
        if state.is_world_process_zero:
            append_text(self.path, json.dumps(record) + "\n")

    def _training_record(self, logs: dict[str, float], training_seconds: float) -> dict[str, float]:
        tokens = logs.get("num_tokens", 0)
        last_seconds, last_tokens = self._last
        self._last = (training_seconds, tokens)
        record = {"loss": logs["loss"], "learning_rate": logs["learning_rate"]}
        if math.isfinite(logs.get("grad_norm", math.nan)):  # not in a step that float16's scaler has skipped
            record["gradient_norm"] = logs["grad_norm"]
        speed = (tokens - last_tokens) / max(training_seconds - last_seconds, 1e-9)
        return record | {"tokens": tokens, "tokens_per_second": round(speed, 1)}

    @property
    def tokens_per_second(self) -> float:
        """Tokens without padding of all training steps per second of training."""
        seconds, tokens = self._last
        return round(tokens / seconds, 1) if seconds else 0.0

    def of(self, name: str) -> list[tuple[int, float]]:
        """Return (step, value) of every record with `name`."""
        return [(int(record["step"]), record[name]) for record in self.records if name in record]


class Progress(TrainerCallback):
    """Shows the latest metrics."""

    def __init__(self, metrics: Metrics, hardware: Hardware) -> None:
        self.metrics = metrics
        self.hardware = hardware
        self.bar: StepProgress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.bar = StepProgress(state.max_steps)
            self.bar.start()

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show loss, validation loss, exact answers, learning rate, speed and memory."""
        losses = self.metrics.of("loss")
        if self.bar is None or not losses:
            return
        rate = self.metrics.of("learning_rate")[-1][1]
        figures = [
            f"loss {losses[-1][1]:.4f}",
            f"lr {f'{rate:.1e}'.replace('e-0', 'e-') if rate else 0}",
            f"{self.metrics.of('tokens_per_second')[-1][1]:.0f} tok/s",
            console.memory(peak_memory_bytes(self.hardware)),
        ]
        self.bar.update(losses[-1][0], "  ".join(figures), *self._validation())

    def _validation(self) -> tuple[str, int]:
        """Return what the newest validation has measured of the adapter, and at which step."""
        step, loss = (self.metrics.of("validation_loss") or [(0, 0.0)])[-1]
        if not step:  # that of step 0 is the base's, and would look like no progress
            return "", 0
        exact = [f"exact {share:.0%}" for _, share in self.metrics.of("exact_answers")[-1:]]
        return "  ".join([f"val {loss:.4f}", *exact]), step

    def close(self) -> None:
        """Remove the bar; also called after an error."""
        if self.bar is not None:
            self.bar.stop()


class DivergenceGuard(TrainerCallback):
    """Stops at the first loss or gradient that is not finite, before anything is saved from it.

    Args:
        trainer: provides the rows trained on since the last good step.
        place: returns the place of a row by number.
        warn: called for a loss or gradient of exactly 0, which does not stop the run.
    """

    def __init__(self, trainer: AdapterTrainer, place: Callable[[int], str], warn: Callable[[str], None]) -> None:
        self.trainer, self.place, self.warn = trainer, place, warn
        self._zeros: set[str] = set()
        self._skipped = 0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Check the trainer's log.

        Raises:
            LoratuneError: with step, loss, gradient norm and learning rate.
        """
        bad = [name for name in ("loss", "grad_norm", "eval_loss") if not math.isfinite(logs.get(name, 0.0))]
        if bad == ["grad_norm"] and self._is_scale_search():
            return
        if bad:
            figures = ", ".join(
                f"{name} {logs[name]:g}" for name in ("loss", "grad_norm", "learning_rate", "eval_loss") if name in logs
            )
            raise self._diverged(f"at step {state.global_step}: {figures}")
        if "loss" in logs:
            self._skipped = 0
            self.trainer.forget_rows()
        for name in ZERO_REASONS:
            if logs.get(name) == 0 and name not in self._zeros:
                self._zeros.add(name)
                self.warn(f"step {state.global_step}: {ZERO_REASONS[name]}")

    def _is_scale_search(self) -> bool:
        """Whether float16's scaler has skipped the step: it begins too high, and halves its scale until it fits."""
        accelerator = self.trainer.accelerator
        self._skipped += 1
        was_skipped = accelerator.scaler is not None and accelerator.optimizer_step_was_skipped
        return was_skipped and self._skipped <= MOST_SKIPPED

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        """Check the weights before a checkpoint, unless the step's log will include loss and gradient norm.

        Raises:
            LoratuneError: a trained weight is not finite.
        """
        tells_all = control.should_log and args.max_grad_norm > 0  # otherwise no norm is computed
        if not control.should_save or tells_all:
            return
        trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
        if not all(parameter.isfinite().all() for parameter in trained):
            raise self._diverged(f"at or before step {state.global_step}: the adapter's weights are not finite")

    def _diverged(self, what: str) -> LoratuneError:
        message = (
            f"training diverged {what}. Earlier checkpoints are untouched; try a lower training.learning_rate, a "
            "longer training.warmup, or model.dtype float32"
        )
        newest = self.trainer.newest_rows
        if newest:
            rows = [self.place(number) for number in newest[:SHOWN_ROWS]]
            message += f"\nrows since the last good step:\n{bullet_list(rows, total=len(newest))}"
        return LoratuneError(message, Exit.DIVERGED)
