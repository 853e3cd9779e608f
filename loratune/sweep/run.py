"""A sweep from its command to its report."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loratune import console
from loratune.commands import Command, loratune
from loratune.errors import Exit, Interrupted, LoratuneError, bullet_list
from loratune.recipe.loading import dump_recipe, dump_sweep, with_settings
from loratune.recipe.sweep_section import seconds_of
from loratune.runtime import signals_to
from loratune.sweep.conductor import Conductor
from loratune.sweep.definition import SWEEP_RECIPE, Sweep
from loratune.sweep.drawing import PAGE, PICTURE, draw
from loratune.sweep.messages import Rehearsal
from loratune.sweep.plan import Trial
from loratune.sweep.pool import Pool, places
from loratune.sweep.report import SweepReport, SweepState, write_sweep_report
from loratune.sweep.results import report_of
from loratune.sweep.showing import on_one_line, tell_price, tell_result, tell_start
from loratune.sweep.space import single_values
from loratune.sweep.study import SweepStudy
from loratune.writing import disk_errors_explained, write_text

BEST = "best.yaml"
BEST_RUN = "best"
"""Folder of the run that best.yaml describes, beside it."""


def run_sweep(sweep: Sweep, workers: int) -> SweepReport:
    """Train the trials of a sweep, and leave its report in its folder.

    Args:
        sweep: the sweep; its folder may hold its beginning, or other processes may work on it.
        workers: how many trials to train at once here.

    Raises:
        LoratuneError: nothing could be started, or no trial has a result.
        Interrupted: a signal ended it; the trials have saved where they stand.
    """
    pool = Pool(places(1, []))
    with signals_to(pool.pass_on), disk_errors_explained(sweep.folder):
        rehearsal = _rehearsed(sweep, pool)
        if workers > 1 and 0 < rehearsal.gpus < workers:
            raise LoratuneError(
                f"--workers {workers}: each takes a GPU, and torch sees {rehearsal.gpus} on this machine", Exit.USAGE
            )
        pool.places = places(workers, _gpus(rehearsal.gpus))
        sweep = _begun(sweep, rehearsal)
        study = SweepStudy(sweep.folder, sweep.space, sweep.plan.best_by)
        study.require_rows(rehearsal.rows)
        _add(sweep, study, rehearsal.steps)
        end = _conducted(sweep, study, pool, rehearsal, workers)
        trials = study.trials()
        if end == "finished":
            study.close()
        report = replace(report_of(sweep, trials), state=end)
        _leave(sweep, report, trials)
    if pool.signal:
        raise Interrupted(pool.signal, "interrupted; the trials are saved", [go_on(sweep)])
    if any(trial.failure for trial in trials) and not any(trial.outcomes for trial in trials):
        raise _nothing(trials)
    return report


def go_on(sweep: Sweep) -> Command:
    """Return the command that continues a sweep."""
    return loratune("go on with", "sweep", {"--output": sweep.folder, "--resume": True})


def _rehearsed(sweep: Sweep, pool: Pool) -> Rehearsal:
    """Prepare the rows in a process of its own, which encodes them for all trials."""
    settings = sweep.chosen or ({}, *single_values(sweep.space))
    recipes = [sweep.recipe_of(one, "rehearsal") for one in settings]
    place = pool.free()
    assert place
    with console.status("preparing the rows"):
        pool.start(place, tuple(recipes), None, Path(os.devnull))
        ended = None
        while ended is None:
            ended = next((one.ended() for one in pool.wait()), None)
    if pool.signal:
        raise Interrupted(pool.signal, "interrupted before the first trial")
    if not isinstance(ended.result, Rehearsal):
        raise LoratuneError(ended.message, Exit(ended.code) if ended.code in [*Exit] else Exit.BUG)
    return ended.result


def _gpus(count: int) -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(number) for number in range(count)]


def _begun(sweep: Sweep, rehearsal: Rehearsal) -> Sweep:
    """Write what identifies the folder and the sweep, and fix the day that prompts name."""
    if rehearsal.date:
        sweep = replace(sweep, recipe=with_settings(sweep.recipe, {"prompt.date": rehearsal.date}))
    path = sweep.folder / SWEEP_RECIPE
    if path.is_file():
        return sweep
    sweep.folder.mkdir(parents=True, exist_ok=True)
    write_sweep_report(sweep.folder, report_of(sweep, []))
    write_text(path, dump_sweep(sweep.recipe, sweep.settings))
    return sweep


def _add(sweep: Sweep, study: SweepStudy, steps: Sequence[int]) -> None:
    """Add the trials that are known from the beginning, after those that are there, and try failed ones again."""
    with study.creating():
        known = len(study.trials())
        for settings, count in list(zip(sweep.chosen, steps, strict=False))[known:]:
            study.add(settings, count)
    for trial in study.forget_failures():
        console.say(f"{trial.name} had failed and is tried again")


def _conducted(sweep: Sweep, study: SweepStudy, pool: Pool, rehearsal: Rehearsal, workers: int) -> SweepState:
    trials = study.trials()
    tell_start(sweep, trials, rehearsal.steps, workers)
    is_priced = any(trial.outcomes for trial in trials)

    def tell(trial: Trial, trials: Sequence[Trial]) -> None:
        nonlocal is_priced
        tell_result(sweep, trial, trials, workers)
        if not is_priced and trial.outcomes:
            is_priced = True
            tell_price(sweep, trials, workers)
        write_sweep_report(sweep.folder, report_of(sweep, trials))

    budget = sweep.settings.budget
    seconds = seconds_of(budget) if budget else math.inf
    end = Conductor(sweep, study, pool, rehearsal, seconds, tell).run()
    if end == "out of budget":
        console.say(f"the budget of {budget} is used up; {go_on(sweep)} --budget {budget}")
    return end


def _leave(sweep: Sweep, report: SweepReport, trials: Sequence[Trial]) -> None:
    """Write what a sweep ends in."""
    write_sweep_report(sweep.folder, report)
    if not any(trial.outcomes for trial in trials):
        return
    try:
        draw(sweep.folder, report)
    except Exception as error:  # what has been found does not depend on its picture
        console.warn(f"{PICTURE} and {PAGE} failed: {type(error).__name__}: {error}")
    if report.best:
        best = {**report.best.settings, "output": str(sweep.folder / BEST_RUN)}
        write_text(sweep.folder / BEST, dump_recipe(with_settings(sweep.recipe, best)))


def next_command(sweep: Sweep) -> Command:
    """Return the command that trains the best recipe."""
    return loratune("train it", "sft", {"--config": sweep.folder / BEST})


def _nothing(trials: Sequence[Trial]) -> LoratuneError:
    failures = [(trial, trial.failure) for trial in trials if trial.failure]
    told = bullet_list([f"{trial.name}: {on_one_line(failure.message)}" for trial, failure in failures])
    code = failures[0][1].code
    return LoratuneError(f"no trial has a result:\n{told}", Exit(code) if code in [*Exit] else Exit.IO)
