"""The callbacks of a run and their order, and the run with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from loratune.training.base_start import BaseStart
from loratune.training.callbacks import DivergenceGuard, Metrics, Progress
from loratune.training.checkpoints.keeper import CheckpointKeeper
from loratune.training.checkpoints.signals import StopSignals
from loratune.training.reporting.expert_use import ExpertCounter
from loratune.training.reporting.health import GradientFlow
from loratune.training.reporting.start_up import StartUp
from loratune.training.reporting.trackers import Trackers

if TYPE_CHECKING:
    from loratune.training.session import Session
    from loratune.training.trainer import AdapterTrainer


class Watchers(NamedTuple):
    """The callbacks of a run; the trainer calls them in this order for each event."""

    start_up: StartUp  # first: the others' work belongs to the next stage
    stops: StopSignals  # before the guard, which checks weights to be saved, also those saved for a signal
    base_start: BaseStart  # before all that look at weights or save them
    guard: DivergenceGuard  # before those that record or save, so that nothing is kept of a diverged step
    metrics: Metrics
    progress: Progress  # after metrics: it shows the latest record
    keeper: CheckpointKeeper
    flow: GradientFlow
    expert_counter: ExpertCounter
    trackers: Trackers


class ActiveTraining(NamedTuple):
    """The trainer and its callbacks."""

    trainer: AdapterTrainer
    watchers: Watchers


def add_watchers(session: Session, trainer: AdapterTrainer, metrics: Metrics, keeper: CheckpointKeeper) -> Watchers:
    """Create the callbacks and add them to the trainer."""
    watchers = Watchers(
        start_up=session.start_up,
        stops=session.stops,
        base_start=BaseStart(session.model, session.recipe.lora.starts_from_base),
        guard=DivergenceGuard(trainer, session.data.train.place, session.notes.warn),
        metrics=metrics,
        progress=Progress(metrics, session.hardware),
        keeper=keeper,
        flow=GradientFlow(),
        expert_counter=ExpertCounter(session.model),
        trackers=Trackers(session.recipe.tracking, session.output, session.stops),
    )
    for watcher in watchers:
        trainer.add_callback(watcher)
    return watchers
