"""From a recipe to a run folder: the flow of `loratune sft`, top to bottom."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging
from trl import SFTConfig

from loratune import console
from loratune.data.dataset import as_dataset
from loratune.data.encoding import Encoder
from loratune.data.preparation import PreparedData
from loratune.errors import Exit, LoratuneError, counted
from loratune.model.adapter import AdapterSummary, attach_adapter, load_adapter_weights, save_adapter, summarise_adapter
from loratune.model.base import dtype_name, load_base
from loratune.model.document_attention import use_document_attention
from loratune.model.elementwise import use_fused_elementwise
from loratune.model.files import find_base, weight_files
from loratune.model.hardware import Hardware, detect_hardware
from loratune.model.lora_linear import use_fused_lora
from loratune.model.memory import keep_freed_memory
from loratune.model.tokenizer import load_tokenizer, set_pad_token
from loratune.recipe.advice import advise
from loratune.recipe.sections import Recipe
from loratune.runs.card import write_card
from loratune.runs.fingerprint import fingerprint_base
from loratune.runs.folder import ADAPTER, create_run, prepare_output, seal_run, set_status
from loratune.runs.probe import MAX_QUESTIONS, save_probe
from loratune.runs.tokenizer_files import copy_tokenizer_files
from loratune.runs.versions import library_versions
from loratune.training.activations import Activations, activations_text, measure_activations
from loratune.training.arguments import training_arguments
from loratune.training.batching import Batching
from loratune.training.callbacks import DivergenceGuard, Metrics, Progress
from loratune.training.checkpoints import CheckpointKeeper
from loratune.training.failures import machine_errors_explained
from loratune.training.gate import pass_gate
from loratune.training.report import write_report
from loratune.training.start_up import StartUp
from loratune.training.steps import StepPlan, plan_steps
from loratune.training.trainer import AdapterTrainer
from loratune.writing import folder_in_one_step


@dataclass
class Session:
    """Everything that a run has gathered before its first step."""

    recipe: Recipe
    output: Path
    hardware: Hardware
    base: Path
    tokenizer: Any
    encoder: Encoder
    data: PreparedData
    model: Any
    """The base with the adapter on it, as PEFT makes it."""
    summary: AdapterSummary
    plan: StepPlan
    arguments: SFTConfig
    warnings: list[str]
    start_up: StartUp


def train(recipe: Recipe, overwrite: bool = False) -> dict[str, Any]:
    """Train an adapter as the recipe says and leave a run folder.

    Nothing is written before data, model and settings have proved usable.

    Args:
        recipe: what to train.
        overwrite: replace an earlier run in the same folder.

    Returns:
        The report, as in the run's report.json.

    Raises:
        LoratuneError: with what is wrong and what to do.
    """
    output = Path(recipe.output)
    if console.IS_SPEAKER:
        prepare_output(output, overwrite)
    with machine_errors_explained(recipe):
        session = _gather(recipe, output)
        trainer, metrics, keeper, progress = _build_trainer(session)
        if console.IS_SPEAKER:
            create_run(output, recipe, _manifest(session))
            probed = session.data.validation or session.data.train
            save_probe(output, as_dataset(probed), probed.questions(MAX_QUESTIONS))
        trainer.accelerator.wait_for_everyone()
        with _status_kept(output, trainer):
            try:
                trainer.train()
            finally:
                progress.close()
            _take_best(trainer, keeper)
            if not console.IS_SPEAKER:
                return {}
            return _finish(session, trainer, metrics, keeper)


def _gather(recipe: Recipe, output: Path) -> Session:
    """Find the base, read the data, load the model; cheap checks before expensive ones."""
    start_up = StartUp()
    start_up.stage_done("imports")
    transformers_logging.set_verbosity_error()
    keep_freed_memory()
    hardware = detect_hardware()
    data = pass_gate(recipe).checked()
    base = find_base(recipe.model)
    tokenizer = load_tokenizer(base)
    encoder = Encoder(tokenizer, recipe.prompt)
    set_pad_token(tokenizer, {encoder.end_id, tokenizer.eos_token_id})
    plan = plan_steps(recipe.training, data.train.lengths, hardware.processes)
    warnings = [*advise(recipe), *data.warnings]
    arguments = training_arguments(recipe, hardware, plan.accumulation, data.validation is not None, warnings)
    _show_data(recipe, data)
    start_up.stage_done("data")
    with console.status(f"loading {recipe.model.base}"):
        model = load_base(recipe.model, base, hardware)
    adapted = attach_adapter(model, recipe.lora, recipe.model.base, recipe.seed)
    use_fused_lora(adapted)
    use_fused_elementwise(model)
    if recipe.training.packing and recipe.model.attention == "auto":
        use_document_attention(model)
    summary = summarise_adapter(adapted)
    activations = None
    if recipe.training.gradient_checkpointing is None:
        activations = measure_activations(adapted, plan.largest_batch_tokens, data.train.longest, hardware)
        arguments.gradient_checkpointing = not activations.fit
    _show_model(recipe, hardware, summary, dtype_name(model.dtype), activations)
    start_up.stage_done("model")
    return Session(
        recipe,
        output,
        hardware,
        base,
        tokenizer,
        encoder,
        data,
        adapted,
        summary,
        plan,
        arguments,
        warnings,
        start_up,
    )


def _build_trainer(session: Session) -> tuple[AdapterTrainer, Metrics, CheckpointKeeper, Progress]:
    recipe, data = session.recipe, session.data
    metrics = Metrics(session.output)
    progress = Progress(metrics, session.hardware)
    keeper = CheckpointKeeper(session.output, recipe.checkpoints, recipe.evaluation)
    trainer = AdapterTrainer(
        model=session.model,
        args=session.arguments,
        batching=Batching(recipe.training, recipe.evaluation.batch_size, recipe.seed, session.tokenizer.pad_token_id),
        train=data.train,
        validation=data.validation,
        processing_class=session.tokenizer,
        callbacks=[session.start_up, DivergenceGuard(), metrics, progress, keeper],
    )
    for warning in session.warnings:
        console.warn(warning)
    rows = ("about " if recipe.training.packing else "") + counted(session.plan.rows_per_step, "row")
    console.say(f"training {counted(session.plan.steps, 'step')} of {rows} on {session.hardware.name}", style="bold")
    return trainer, metrics, keeper, progress


def _take_best(trainer: AdapterTrainer, keeper: CheckpointKeeper) -> None:
    """Go back to the best checkpoint's weights where later steps have been worse."""
    best = keeper.best_checkpoint
    if best is not None and keeper.best_step != trainer.state.global_step:
        load_adapter_weights(trainer.accelerator.unwrap_model(trainer.model), best)


def _finish(session: Session, trainer: AdapterTrainer, metrics: Metrics, keeper: CheckpointKeeper) -> dict[str, Any]:
    """Write the adapter with its tokenizer and card, the report and the picture, and seal the run."""
    with folder_in_one_step(session.output / ADAPTER) as folder:
        save_adapter(trainer.accelerator.unwrap_model(trainer.model), folder)
        copy_tokenizer_files(session.base, folder)
        write_card(folder, session.recipe)
    report = write_report(session, trainer, metrics, keeper)
    seal_run(session.output)
    set_status(session.output, "finished", step=trainer.state.global_step, steps=trainer.state.max_steps)
    return report


def _manifest(session: Session) -> dict[str, Any]:
    """What later commands need to know of the run, and what they check."""
    encoder = session.encoder
    return {
        "base": {
            "name": session.recipe.model.base,
            "path": str(session.base.absolute()),
            **fingerprint_base(session.base, weight_files(session.base)),
        },
        "template": {"sha256": encoder.template_sha256, "end_token_id": encoder.end_id},
        "data": [vars(use) for use in session.data.files],
        "seed": session.recipe.seed,
        "versions": library_versions(),
    }


@contextmanager
def _status_kept(output: Path, trainer: AdapterTrainer) -> Iterator[None]:
    """Note in status.json how a run ended that did not finish; its adapter is never written."""
    try:
        yield
    except BaseException as error:
        if console.IS_SPEAKER:
            interrupted = isinstance(error, KeyboardInterrupt)
            diverged = isinstance(error, LoratuneError) and error.exit_code == Exit.DIVERGED
            state = "interrupted" if interrupted else "diverged" if diverged else "failed"
            set_status(output, state, step=trainer.state.global_step, steps=trainer.state.max_steps)
        raise


def _show_data(recipe: Recipe, data: PreparedData) -> None:
    splits = [("training", data.train), ("validation", data.validation)]
    rows = [
        (
            name,
            f"{counted(len(split), 'row')}, {split.tokens} tokens ({split.trained_tokens / split.tokens:.0%} trained), "
            f"longest {split.longest}",
        )
        for name, split in splits
        if split is not None
    ]
    files = ", ".join(f"{Path(use.path).name} ({use.rows} {use.format})" for use in data.files)
    console.table([("files", files), *rows, ("template", recipe.prompt.template)], title="data")


def _show_model(
    recipe: Recipe, hardware: Hardware, summary: AdapterSummary, dtype: str, activations: Activations | None
) -> None:
    modules = ", ".join(f"{name} × {count}" for name, count in summary.modules.items())
    held = dtype if recipe.model.quantization == "none" else recipe.model.quantization
    share = summary.trainable_parameters / summary.total_parameters
    console.table(
        [
            ("base", f"{recipe.model.base}, {held}, {console.memory(summary.base_bytes)}"),
            (
                "adapter",
                f"rank {recipe.lora.rank}, alpha {recipe.lora.alpha:g}, {console.memory(summary.adapter_bytes)}",
            ),
            ("trains", f"{summary.trainable_parameters:,} of {summary.total_parameters:,} parameters ({share:.2%})"),
            ("modules", modules),
            *([("a step", activations_text(activations))] if activations else []),
        ],
        title="model",
    )
