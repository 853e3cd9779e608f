"""Puts together what a sweep has found, for sweep.json and everything that is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratune.choices import BestBy
from loratune.errors import Exit
from loratune.sweep.comparison import Findings, noise_of, standings
from loratune.sweep.definition import Sweep
from loratune.sweep.plan import Trial, judged, order
from loratune.sweep.price import measured
from loratune.sweep.reached import adapter_size
from loratune.sweep.report import BITS, NATS, SweepReport, TrialReport, TrialState


def report_of(sweep: Sweep, trials: Sequence[Trial]) -> SweepReport:
    """Return what is known of a sweep; while it runs, without what only its end can say."""
    price, last, best_by = measured(trials), sweep.plan.last, sweep.plan.best_by
    unit = BITS if sweep.varies_base else NATS
    found = standings(trials, last, best_by)
    places = {one.name: place for place, one in enumerate(found)}
    ordered = sorted(trials, key=lambda trial: (places.get(trial.name, len(places)), *_order(trial, best_by)))
    report = SweepReport(
        output=str(sweep.folder),
        base=sweep.recipe.model.base,
        over=sweep.settings.over,
        sampler=sweep.sampler,
        shares=tuple(float(share) for share in sweep.plan.shares),
        unit=unit,
        seconds_per_step=price.seconds_per_step if price else None,
        trials=tuple(_trial(sweep, trial, trials) for trial in ordered),
    )
    if not found:
        return report
    return replace(
        report,
        ranked_by=judged(found[0], best_by),
        best=found[0],
        repeated=tuple(one for one in found if one.seeds > 1),
        noise=noise_of(trials, last, judged(found[0], best_by)),
        sentence=Findings(trials, last, sweep.space, best_by, unit).sentence(),
    )


def _order(trial: Trial, best_by: BestBy) -> tuple[float, ...]:
    newest = trial.newest
    return (-max(trial.outcomes, default=-1), *(order(newest, best_by) if newest else ()), trial.number)


def _trial(sweep: Sweep, trial: Trial, trials: Sequence[Trial]) -> TrialReport:
    newest, size = trial.newest, adapter_size(sweep.run_folder(trial.name))
    return TrialReport(
        name=trial.name,
        settings=dict(trial.settings),
        state=_state(sweep, trial, trials),
        repeats=None if trial.repeats is None else trials[trial.repeats].name,
        seed=trial.seed,
        loss=newest.loss if newest else None,
        losses={str(one.step): one.loss for _, one in sorted(trial.outcomes.items())},
        exact=newest.exact if newest else None,
        exacts={str(one.step): one.exact for _, one in sorted(trial.outcomes.items()) if one.exact is not None},
        forgetting=newest.forgetting if newest else None,
        step=newest.step if newest else 0,
        steps=newest.steps if newest else trial.steps,
        seconds=newest.seconds if newest else None,
        peak_memory_bytes=max((one.peak_memory_bytes or 0 for one in trial.outcomes.values()), default=0) or None,
        trained_parameters=size[0] if size else None,
        adapter_bytes=size[1] if size else None,
        message=trial.failure.message if trial.failure else None,
    )


def _state(sweep: Sweep, trial: Trial, trials: Sequence[Trial]) -> TrialState:
    if trial.failure:
        return "diverged" if trial.failure.code == Exit.DIVERGED else "failed"
    if sweep.plan.last in trial.outcomes:
        return "finished"
    is_open = any(work.trial is trial for work in sweep.plan.work(trials))
    return "waiting" if is_open or not trial.outcomes or not _is_left_behind(sweep, trial, trials) else "stopped"


def _is_left_behind(sweep: Sweep, trial: Trial, trials: Sequence[Trial]) -> bool:
    """Return whether better trials have gone on at the rung that a trial has reached."""
    levels, rung = sweep.plan.levels(trials), max(trial.outcomes)
    return len(levels) > rung + 1 and all(trial is not other for other in levels[rung + 1])
