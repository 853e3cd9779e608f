"""TRL's SFTTrainer with additions: steps of several passes, validation loss per token, and atomic checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers.trainer_callback import PrinterCallback, TrainerState
from trl import SFTTrainer

from loratune.data.assembly.dataset import as_dataset
from loratune.data.preparation import PreparedData
from loratune.model.adapter.attach import load_adapter_weights, save_adapter, train_in_float32
from loratune.recipe.sections import Recipe
from loratune.runs.checkpoint import step_folder
from loratune.runs.folder import CHECKPOINTS
from loratune.training.batching import Batching
from loratune.training.checkpoints.signals import StopSignals, ValidationStopped
from loratune.training.checkpoints.states import TRAINER_STATE, settings_kept, state_errors_explained
from loratune.training.determinism import deterministic_kernels
from loratune.training.processes.group import to_first
from loratune.training.processes.replicas import Replicas
from loratune.training.processes.watch import Watch
from loratune.training.rates import with_rate_ratio
from loratune.training.validation import FIGURES, figures, sums_of
from loratune.writing import folder_in_one_step


class AdapterTrainer(SFTTrainer):
    """Trains a PEFT model on rows that already have ids and labels."""

    def __init__(
        self,
        batching: Batching,
        data: PreparedData,
        stops: StopSignals,
        seal: Callable[[Path, int, int], None],
        watch: Watch,
        recipe: Recipe,
        **settings: Any,
    ) -> None:
        """Create a trainer.

        Args:
            batching: combines sequences into batches.
            data: training and validation sequences.
            stops: signals to check during validation.
            seal: completes a checkpoint; called with its folder, the step, and the total number of tokens.
            watch: notices that the run makes no progress.
            recipe: the run's recipe, of which kernels and rates are taken.
            settings: arguments of SFTTrainer.
        """
        super().__init__(
            train_dataset=as_dataset(data.train),
            eval_dataset=as_dataset(data.validation) if data.validation else None,
            data_collator=batching.collate,
            **settings,
        )
        self.remove_callback(PrinterCallback)
        train_in_float32(self.model)
        self._batching, self._data = batching, data
        self._stops, self._seal, self._watch, self._recipe = stops, seal, watch, recipe
        self._newest_rows: list[int] = []
        self._own_tokens = 0
        """Of this process, since they were last added to those of all."""

    @property
    def newest_rows(self) -> list[int]:
        """Numbers of the rows trained on since the last `forget_rows`."""
        return list(self._newest_rows)

    def forget_rows(self) -> None:
        """Forget the rows of the steps so far, after a step with finite loss."""
        self._newest_rows.clear()

    def create_optimizer(self, model: Any = None) -> Any:
        """Create the optimizer with the rates of the matrices A and B."""
        ratio = self._recipe.lora.b_learning_rate_ratio
        return with_rate_ratio(super().create_optimizer(model), self.model, ratio)

    def _wrap_model(self, model: Any, *arguments: Any, **settings: Any) -> Any:
        """Return the model that steps call."""
        if self.accelerator.num_processes == 1 or model is not self.model:
            return model
        return Replicas(self.accelerator.prepare_model(model, evaluation_mode=True))  # autocast, and no DDP

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return optimizer steps, each with this process's passes."""
        return self._batching.training_steps(self._data.train, self.args.device)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> int:
        """Return the labelled positions of an optimizer step, over all processes."""
        labelled: int = sum(step["labelled"] for step in batch_samples)
        if self.accelerator.num_processes == 1:
            return labelled
        self._watch.advance()
        return int(self.accelerator.gather(torch.tensor([labelled], device=device)).sum())

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run forward and backward for each pass of an optimizer step.

        transformers would need the same number of passes in each step and process.

        Returns:
            The loss of this process, summed over the passes, detached.
        """
        model.train()
        with deterministic_kernels(self._recipe.training.deterministic):
            losses = [self._backward(model, batch, num_items_in_batch) for batch in inputs["passes"]]
        if isinstance(model, Replicas):
            self._watch.advance()
            model.average_gradients()
        return torch.stack(losses).sum()

    def _backward(self, model: Any, batch: dict[str, Any], labelled: Any) -> torch.Tensor:
        self._watch.keep_alive()
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, batch, num_items_in_batch=labelled)
        self.accelerator.backward(loss)
        return loss.detach()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return the loss of a pass divided by the labelled positions of the whole optimizer step.

        Args:
            model: the wrapped model.
            inputs: ids, labels, and the batch's document boundaries or mask.
            return_outputs: not supported.
            num_items_in_batch: labelled positions of the step, over all processes.
        """
        about = inputs.pop("about")
        self._newest_rows.extend(about["sequences"])
        self._own_tokens += about["tokens"]
        outputs = model(**inputs, summed_loss=True)
        # Gradients are averaged over the processes, but the positions are counted over all of them.
        loss: torch.Tensor = outputs.loss_sum * self.accelerator.num_processes / max(num_items_in_batch, 1)
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: counting the model's parameters for transformers' estimate takes 10 ms per step."""
        return 0

    def store_flos(self) -> None:
        """Do nothing: the estimate is 0, and the processes would wait for each other to add it up."""

    def _trained_tokens(self) -> int:
        """Return the tokens trained so far by all processes, each of which has to call this.

        They are added up only here, because processes with short batches would wait for the others in every batch.
        """
        newest = torch.tensor([self._own_tokens], device=self.args.device)
        self._own_tokens = 0
        self._watch.advance()
        self._total_train_tokens += int(self.accelerator.gather(newest).sum())
        return int(self._total_train_tokens)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the number of tokens trained so far."""
        self._metrics["train"]["num_tokens"] = [self._trained_tokens()]
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the mean loss per labelled token and the share of exact answers of the validation rows.

        transformers averages the means of batches, which gives tokens of short batches more weight.
        """
        start = time.perf_counter()
        was_training = self.model.training
        self.model.eval()
        try:
            # Data loaders draw random numbers; training must not depend on the number of validations.
            with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
                found = figures(self._sums(self._validation_passes()))
        finally:
            self.model.train(was_training)
        found["runtime"] = round(time.perf_counter() - start, 3)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        self._metrics["eval"].clear()
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _validation_passes(self) -> DataLoader[Any]:
        if self._data.validation is None:
            raise ValueError("there are no validation rows")
        return self._batching.validation_passes(self._data.validation, self.args.device)

    def _sums(self, steps: Any) -> list[float]:
        """Return the sums of `sums_of` over all passes and processes."""
        sums = torch.zeros(FIGURES, dtype=torch.float64, device=self.args.device)
        for step in steps:
            if self._stops.signal is not None and self.accelerator.num_processes == 1:
                raise ValidationStopped
            self._watch.keep_alive()
            for batch in step["passes"]:
                del batch["about"]
                with torch.no_grad(), self.compute_loss_context_manager():
                    sums += sums_of(self.model(**batch, summed_loss=True))
        self._watch.advance()
        total: list[float] = self.accelerator.gather(sums[None]).sum(0).tolist()
        return total

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the step's checkpoint in the first process, which alone has to see the run's folder."""
        tokens = self._trained_tokens()
        others = to_first(None if self.is_world_process_zero() else self._random_state())
        if self.args.should_save:
            target = step_folder(Path(self.args.output_dir) / CHECKPOINTS, self.state.global_step)
            with folder_in_one_step(target) as folder:
                save_adapter(self.accelerator.unwrap_model(self.model), folder)
                self._save_optimizer_and_scheduler(str(folder))
                self._save_scaler(str(folder))
                self._save_rng_state(str(folder))
                for name, content in filter(None, others):
                    (folder / name).write_bytes(content)
                self.state.save_to_json(str(folder / TRAINER_STATE))
                self._seal(folder, self.state.global_step, tokens)
        self._watch.keep_alive()

    def _random_state(self) -> tuple[str, bytes]:
        """Return the name and content of the file with the states of this process's random number generators."""
        with TemporaryDirectory(prefix="loratune-random-") as folder:
            self._save_rng_state(folder)
            (file,) = Path(folder).iterdir()
            return file.name, file.read_bytes()

    def resume(self, checkpoint: Path, tokens: int, is_at_end: bool) -> None:
        """Resume from a checkpoint. If no step is left, only load its weights and state, and run a due validation.

        Args:
            checkpoint: folder of the verified checkpoint.
            tokens: number of tokens trained before.
            is_at_end: whether no step is left.
        """
        self._total_train_tokens = tokens
        if not is_at_end:
            self.train(resume_from_checkpoint=str(checkpoint))
            return
        self.accelerator.prepare_model(self.model, evaluation_mode=True)  # autocast, as in steps
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
        self.callback_handler.on_train_begin(self.args, self.state, self.control)
        if self.args.eval_on_start:
            self._evaluate(None, None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load weights into the existing parameters; PEFT would create new ones, with another dtype on a 4-bit base."""
        load_adapter_weights(self.accelerator.unwrap_model(model or self.model), Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the states of optimizer and schedule from the checkpoint, and their settings from the recipe.

        transformers also takes the settings from the checkpoint, which silently ignores a changed learning rate.
        """
        optimizer = None if checkpoint is None else self.optimizer
        with settings_kept(optimizer, self.lr_scheduler), state_errors_explained(Path(checkpoint or "")):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with state_errors_explained(Path(checkpoint or "")):
            super()._load_rng_state(checkpoint)

    def _maybe_log_save_evaluate(self, *arguments: Any, **settings: Any) -> None:
        self._watch.advance()  # the loss is gathered here
        super()._maybe_log_save_evaluate(*arguments, **settings)

    def _evaluate(self, *arguments: Any, **settings: Any) -> dict[str, float]:
        """Validate; if a signal arrives meanwhile, save the step and leave the validation to the resumed run."""
        try:
            metrics: dict[str, float] = super()._evaluate(*arguments, **settings)
        except ValidationStopped:
            if self.state.global_step == 0:
                self._stops.raise_if_any()
            self._stops.put_off_validation()
            self.control.should_save = self.control.should_training_stop = True
            return {}
        return metrics

    def _run_epoch(self, **settings: Any) -> None:
        """Train an epoch, unless a validation that was made up for after resuming stops the run."""
        if not self.control.should_training_stop:
            super()._run_epoch(**settings)
