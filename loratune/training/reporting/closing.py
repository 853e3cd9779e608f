"""Closing work of a finished run: sample generations, health and plot; none of it can fail the run."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from loratune import console
from loratune.errors import Interrupted
from loratune.model.adapter.own_weights import in_base_dtype
from loratune.model.sharding.gathering import is_sharded
from loratune.protocols import AdaptedModel
from loratune.runs.folder import PLOT, REPORT
from loratune.runs.output import replace_report
from loratune.runs.report import Answers, Report
from loratune.training.failures import attempted
from loratune.training.processes.following import follow, leading
from loratune.training.reporting.answers import Allowance, ask_questions
from loratune.training.reporting.health import examine
from loratune.training.reporting.plot import plot_losses

if TYPE_CHECKING:
    from loratune.training.session import Session
    from loratune.training.watchers import ActiveTraining

LEAST_SECONDS = 10.0
"""Minimum time for sample generations after a short training."""


def close_run(session: Session, running: ActiveTraining, report: Report) -> Report:
    """Complete a finished run's report with its health, and draw its losses.

    The first signal skips the sample generations, the second one the rest; the run is finished in any case.

    Args:
        session: the run's session.
        running: its trainer and callbacks.
        report: the content of report.json.

    Returns:
        The new content of report.json.
    """
    watchers, warn = running.watchers, session.notes.warn
    try:
        with session.stops.skipping():
            answers = attempted("the closing questions", lambda: _answers(session, running), warn)
            health = attempted(
                "the report of the adapter's health",
                lambda: examine(
                    _model(running),
                    watchers.flow,
                    watchers.metrics,
                    answers,
                    watchers.expert_counter.use,
                    session.weights.norms,
                ),
                warn,
            )
            report = replace(report, health=health, warnings=tuple(session.notes.told))
            attempted(REPORT, lambda: replace_report(session.output, report), warn)
            attempted(PLOT, lambda: plot_losses(watchers.metrics, session.output / PLOT), warn)
    except Interrupted:
        console.warn(f"stopped at the end; {session.output} is finished, but what its report says may be incomplete")
    return replace(report, warnings=tuple(session.notes.told))


def _answers(session: Session, running: ActiveTraining) -> Answers | None:
    share, trained = session.recipe.evaluation.questions_share, running.watchers.metrics
    if not share:
        return None
    allowance = Allowance(
        seconds=max(share * trained.seconds, LEAST_SECONDS),
        reading_speed=trained.tokens_per_second,
        is_over=lambda: session.stops.has_come,
    )
    gathering = leading(_model(running)) if is_sharded(_model(running)) else nullcontext()
    with gathering, in_base_dtype(_model(running)):
        return ask_questions(_model(running), session.encoder, session.data, allowance)


def take_part(session: Session, running: ActiveTraining) -> None:
    """Let the first process ask the closing questions, in another one: weights are gathered by all."""
    if session.recipe.evaluation.questions_share and is_sharded(_model(running)):
        with session.stops.skipping(), suppress(Interrupted):
            follow(_model(running))


def _model(running: ActiveTraining) -> AdaptedModel:
    model: AdaptedModel = running.trainer.accelerator.unwrap_model(running.trainer.model)
    return model
