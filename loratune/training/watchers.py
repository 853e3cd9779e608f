"""Those who watch a run, and the order in which they are told."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from loratune.training.callbacks import DivergenceGuard, Metrics, Progress
from loratune.training.checkpoints.keeper import CheckpointKeeper
from loratune.training.checkpoints.stops import Stops
from loratune.training.reporting.health import GradientFlow
from loratune.training.reporting.start_up import StartUp
from loratune.training.reporting.trackers import Trackers

if TYPE_CHECKING:
    from loratune.training.run import Session
    from loratune.training.trainer import AdapterTrainer


class Watchers(NamedTuple):
    """The callbacks of a run; the trainer calls each event of all of them in the order that they have here."""

    start_up: StartUp  # first: what the others do belongs to the stage that begins
    stops: Stops  # before the guard, which looks at the weights of every step that is to be saved: a signal's is one
    guard: DivergenceGuard  # before all who record or keep: nothing stays of a step whose numbers are bad
    metrics: Metrics
    progress: Progress  # after metrics, whose newest record it shows
    keeper: CheckpointKeeper
    flow: GradientFlow
    trackers: Trackers


def add_watchers(session: Session, trainer: AdapterTrainer, metrics: Metrics, keeper: CheckpointKeeper) -> Watchers:
    """Have a run watched."""
    watchers = Watchers(
        start_up=session.start_up,
        stops=session.stops,
        guard=DivergenceGuard(trainer, session.data.train.place, session.notes.warn),
        metrics=metrics,
        progress=Progress(metrics, session.hardware),
        keeper=keeper,
        flow=GradientFlow(),
        trackers=Trackers(session.recipe.tracking, session.output, session.stops),
    )
    for watcher in watchers:
        trainer.add_callback(watcher)
    return watchers
