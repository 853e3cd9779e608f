"""The training run, from a recipe to a run folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from loratune import console
from loratune.data.assembly.dataset import as_dataset
from loratune.errors import Exit, Interrupted, LoratuneError, counted
from loratune.model.adapter.attach import load_adapter_weights, save_adapter
from loratune.model.hardware import detect_hardware
from loratune.recipe.sections import Recipe
from loratune.runs.card import write_card
from loratune.runs.checkpoint import Checkpoint, open_checkpoint, seal_checkpoint, step_folder
from loratune.runs.data_findings import DataFinding, save_findings
from loratune.runs.folder import ADAPTER
from loratune.runs.going_on import next_command
from loratune.runs.lock import run_lock
from loratune.runs.manifest import Manifest
from loratune.runs.output import begin_run, clear_unfinished, prepare_output, seal_run
from loratune.runs.probe import MAX_QUESTIONS, save_probe
from loratune.runs.record import RunRecord
from loratune.runs.report import Report, write_report
from loratune.runs.seals import open_report
from loratune.runs.status import set_status
from loratune.runs.tokenizer_files import copy_tokenizer_files
from loratune.runtime import end_with_launcher, is_main_process, launch_problems
from loratune.training.batching import Batching
from loratune.training.callbacks import Metrics
from loratune.training.checkpoints.keeper import CheckpointKeeper, check_room
from loratune.training.checkpoints.resuming import (
    ATTENTION,
    PACKED,
    PASS_TOKENS,
    Resume,
    as_begun,
    begun_manifest,
    check_identity,
    completion,
    find_start,
)
from loratune.training.checkpoints.sharing import readable_everywhere, require_run_of_first
from loratune.training.checkpoints.signals import StopSignals
from loratune.training.failures import attempted, machine_errors_explained
from loratune.training.processes.agreement import require_same_everywhere
from loratune.training.processes.group import from_all, from_first, process_group
from loratune.training.processes.watch import Watch
from loratune.training.record import identity_now, manifest_of
from loratune.training.reporting.closing import close_run, take_part
from loratune.training.reporting.report import report_of
from loratune.training.session import Session, load, prepare
from loratune.training.steps import step_of
from loratune.training.trainer import AdapterTrainer
from loratune.training.watchers import ActiveTraining, add_watchers
from loratune.writing import folder_in_one_step


def train(
    recipe: Recipe, overwrite: bool = False, resume: Resume | None = None, share: Fraction | None = None
) -> Report | None:
    """Train an adapter as the recipe says and leave a run folder.

    Nothing is written before data, model and settings have been validated.

    Args:
        recipe: the recipe.
        overwrite: replace an existing run in the folder.
        resume: continue the run in the folder.
        share: stop after this share of the steps, with a validation and a checkpoint, as after a signal.

    Returns:
        The report, as in the run's report.json; None in a process that is not the main one.

    Raises:
        LoratuneError: with the problem and advice.
        Interrupted: a signal ended the run.
        Paused: it has done its share.
    """
    if problems := launch_problems():
        raise LoratuneError(f"{'; '.join(problems)}. Unset what is left over, or start sft with --gpus", Exit.USAGE)
    output, stops = Path(recipe.output), StopSignals()
    end_with_launcher()
    with ExitStack() as stack:
        stack.enter_context(stops.heeded())
        stack.enter_context(machine_errors_explained(recipe))
        hardware = detect_hardware()
        stack.enter_context(process_group(hardware, recipe.training.ddp_timeout))
        if is_main_process():  # connected to the others, so that they end at once where it refuses
            prepare_output(output, overwrite or resume is not None)
            stack.enter_context(run_lock(output))
        # The run's folder may be on its machine alone, and its flags count where another one's differ.
        resume, begun, manifest = from_first(lambda: (resume, *_begun(output, resume)))
        if resume and not begun:
            require_run_of_first(output)
        start = stack.enter_context(readable_everywhere(begun))
        prepared = prepare(*as_begun(recipe, manifest, start), output, hardware, stops)
        if start and resume:
            check_identity(start, identity_now(prepared), resume.allow_changes)
            told = from_first(lambda: completion(output, start, prepared.plan.steps, recipe.evaluation.early_stopping))
            if told:
                console.say(told)
                if not is_main_process():
                    return None
                attempted("the removal of unfinished files", lambda: clear_unfinished(output))
                return open_report(output)
        stops.last_step = step_of(share, prepared.plan.steps) if share else None
        session = load(prepared, start)
        stack.enter_context(machine_errors_explained(recipe, session.prediction))
        return _train(session, start)


def _begun(output: Path, resume: Resume | None) -> tuple[Checkpoint | None, Manifest | None]:
    """Return what is known of a run that goes on, from its folder."""
    start = find_start(output, resume) if resume else None
    return start, begun_manifest(output, start)


def _train(session: Session, start: Checkpoint | None) -> Report | None:
    """Make the steps that are left, and finish the run."""
    output, stops, identity = session.output, session.stops, identity_now(session)
    require_same_everywhere(identity)
    watch = Watch(session.recipe.training.ddp_timeout, lambda: _abandon(running))
    running = _build_trainer(session, identity, watch)
    trainer = running.trainer
    if is_main_process():
        check_room(output, session.recipe.checkpoints, session.summary.adapter_bytes)
        manifest = replace(manifest_of(session), checks=session.checked.checks)
        begin_run(output, session.recipe, manifest, start is not None, session.plan.steps)
        probed = session.data.validation or session.data.train
        save_probe(output, as_dataset(probed), probed.questions(MAX_QUESTIONS))
        save_findings(output, [DataFinding(**vars(one)) for one in session.data.found])
    trainer.accelerator.wait_for_everyone()
    with _status_kept(output, trainer):
        try:
            with stops.after_step(watch.advance), watch:
                if start:
                    _go_on(running, start, session.plan.steps, stops)
                else:
                    trainer.train()
                watch.advance()
                from_all(None)  # a process that ended before the last checkpoint would count as one that has stopped
        finally:
            running.watchers.progress.close()
            running.watchers.trackers.close()
        stops.raise_if_any()
        if not is_main_process():  # the checkpoints may be on the first one's machine alone
            take_part(session, running)
            return None
        _take_best(trainer, running.watchers.keeper)
        report = _finish(session, running)
    return close_run(session, running, report)


def _go_on(running: ActiveTraining, start: Checkpoint, steps: int, stops: StopSignals) -> None:
    """Train from a checkpoint to the run's number of steps."""
    trainer, metrics, keeper = running.trainer, running.watchers.metrics, running.watchers.keeper
    console.say(f"resuming after step {start.step}")
    metrics.restore(start.step, start.progress)
    keeper.restore(start.progress)
    trainer.args.eval_on_start = bool(start.progress["validation_is_due"])
    is_over = keeper.stopped_early or start.step >= steps
    trainer.resume(start.folder, start.progress["tokens"], is_over or stops.is_reached(start.step))
    if stops.is_reached(start.step) and not keeper.stopped_early:
        stops.pause()


def _abandon(running: ActiveTraining) -> None:
    """Leave the terminal and status.json as after a failure, from another thread than the one that waits in vain."""
    running.watchers.progress.close()
    if is_main_process():
        state = running.trainer.state
        set_status(Path(running.trainer.args.output_dir), "failed", step=state.global_step, steps=state.max_steps)


def _build_trainer(session: Session, identity: dict[str, Any], watch: Watch) -> ActiveTraining:
    recipe, stops = session.recipe, session.stops
    metrics, keeper = Metrics(session.output), CheckpointKeeper(session.output, recipe.checkpoints, recipe.evaluation)

    def seal(folder: Path, step: int, tokens: int) -> None:
        stood = {**metrics.progress, **keeper.progress, "tokens": tokens, "validation_is_due": stops.validation_is_due}
        checked = session.checked
        ran = {PASS_TOKENS: session.passes.tokens, ATTENTION: checked.attention.name, PACKED: checked.is_packed}
        seal_checkpoint(folder, step, identity, stood | ran)

    trainer = AdapterTrainer(
        model=session.model,
        args=session.arguments,
        batching=Batching(recipe.training.batch_size, session.layout, recipe.seed, session.tokenizer.pad_token_id),
        data=session.data,
        stops=stops,
        seal=seal,
        watch=watch,
        recipe=recipe,
        processing_class=session.tokenizer,
    )
    watchers = add_watchers(session, trainer, metrics, keeper)
    for warning in (*session.warnings, *watchers.trackers.warnings):
        session.notes.warn(warning)
    rows, hardware = counted(session.plan.rows_per_step, "row"), session.hardware
    place = (
        f"in {hardware.processes} processes, each on {hardware.name}"
        if hardware.is_distributed
        else f"on {hardware.name}"
    )
    console.say(f"training {counted(session.plan.steps, 'step')} of {rows} {place}", style="bold")
    return ActiveTraining(trainer, watchers)


def _take_best(trainer: AdapterTrainer, keeper: CheckpointKeeper) -> None:
    """Restore the best checkpoint's weights if later steps were worse."""
    best = keeper.best_checkpoint
    if best is not None and best != step_folder(keeper.folder, trainer.state.global_step):
        load_adapter_weights(trainer.accelerator.unwrap_model(trainer.model), open_checkpoint(best).folder)


def _finish(session: Session, running: ActiveTraining) -> Report:
    """Write the adapter with its tokenizer and card, then the report, and seal the run."""
    trainer, metrics, keeper = running.trainer, running.watchers.metrics, running.watchers.keeper
    with folder_in_one_step(session.output / ADAPTER) as folder:
        save_adapter(trainer.accelerator.unwrap_model(trainer.model), folder)
        copy_tokenizer_files(session.base, folder)
        attempted("the adapter's card", lambda: write_card(folder, RunRecord.of(session.recipe)), session.notes.warn)
    report = report_of(session, trainer, metrics, keeper)
    write_report(session.output, report)
    seal_run(session.output)
    stood = {"step": trainer.state.global_step, "steps": trainer.state.max_steps, "stopped_early": keeper.stopped_early}
    set_status(session.output, "finished", **stood)
    return report


@contextmanager
def _status_kept(output: Path, trainer: AdapterTrainer) -> Iterator[None]:
    """Record in status.json how an unfinished run ended."""
    try:
        yield
    except BaseException as error:
        step, steps = trainer.state.global_step, trainer.state.max_steps
        if is_main_process():
            diverged = isinstance(error, LoratuneError) and error.exit_code == Exit.DIVERGED
            state = "interrupted" if isinstance(error, KeyboardInterrupt) else "diverged" if diverged else "failed"
            set_status(output, state, step=step, steps=steps)
        if isinstance(error, Interrupted):
            go_on = next_command(output, "interrupted")
            told = f"interrupted after step {step} of {steps}"
            raise type(error)(error.signal_number, told, [go_on] if go_on else []) from error
        raise
