"""What a sweep prints: a line for each result as it comes, and the closing table, within 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from loratune import console
from loratune.errors import counted
from loratune.printable import shortened
from loratune.sweep.definition import Sweep
from loratune.sweep.plan import Trial
from loratune.sweep.price import duration, measured
from loratune.sweep.report import SweepReport, TrialReport
from loratune.sweep.space import described, short_names, text_of
from loratune.training.steps import step_of

COLUMNS = 80
SETTINGS_WIDTH = 36
LONGEST_VALUE = 18
LONGEST_MESSAGE = 300
ORDINARY = ("finished", "stopped")
"""States that the table does not name."""


def tell_start(sweep: Sweep, trials: Sequence[Trial], steps: Sequence[int], workers: int) -> None:
    """Say what a sweep is going to train, and what it costs where that is known."""
    plan = sweep.plan
    rungs = [f"{size} to {_steps(share, steps)}" for size, share in zip(plan.sizes(), plan.shares, strict=True)]
    console.say(f"{counted(plan.count, 'trial')} ({sweep.sampler}): {', then '.join(rungs)}", style="bold")
    if plan.seeds > 1:
        best = "the best two" if plan.sizes()[-1] > 1 else "the trial"
        console.say(f"then {best} again, with {counted(plan.seeds - 1, 'other seed')}")
    tell_price(sweep, trials, workers)


def tell_price(sweep: Sweep, trials: Sequence[Trial], workers: int) -> None:
    """Say what is left, and how long it takes by what was measured."""
    starts, steps = sweep.plan.left(trials)
    price = measured(trials)
    if price is None:
        cost = "; the first trial shows how long they take"
    else:
        cost = f", about {duration(price.left(sweep.plan, trials, workers))} at {price.seconds_per_step:.2g} s a step"
    console.say(f"{counted(round(steps), 'step')} left in {counted(starts, 'start')}{cost}")


def _steps(share: Fraction, steps: Sequence[int]) -> str:
    ends = sorted({step_of(share, count) or count for count in steps})
    return f"step {ends[0]}" if len(ends) == 1 else f"steps {ends[0]} to {ends[-1]}"


def tell_result(sweep: Sweep, trial: Trial, trials: Sequence[Trial], workers: int) -> None:
    """Print a line for a trial's newest result, or its failure."""
    newest, price = trial.newest, measured(trials)
    if trial.failure:
        end = f"failed ({trial.failure.code}): {on_one_line(trial.failure.message)}"
    elif newest and price:
        left = duration(price.left(sweep.plan, trials, workers))
        end = f"step {newest.step}/{newest.steps}  {newest.loss:.4f}  {duration(newest.seconds)}, {left} left"
    else:
        return
    seed = "" if trial.seed is None else f", seed {trial.seed}"
    settings = shortened(described(trial.settings), SETTINGS_WIDTH - len(seed)) + seed
    console.say(shortened(f"{trial.number:02d}  {settings:<{SETTINGS_WIDTH}}  {end}", COLUMNS))


def show_sweep(report: SweepReport) -> None:
    """Print the closing table, the failures, and the sentence."""
    console.comparison(rows_of(report))
    for trial in report.trials:
        if trial.message:
            console.warn(f"{trial.name} {trial.state}: {on_one_line(trial.message)}")
    if report.sentence:
        console.say(report.sentence, style="bold")


def rows_of(report: SweepReport) -> list[tuple[str, ...]]:
    """Return the table: a header, and a row for each trial; repetitions are in the row of theirs."""
    names = short_names(list(report.over))
    mains = [trial for trial in report.trials if trial.repeats is None]
    has_states = any(trial.state not in ORDINARY for trial in mains)
    head = ("no.", *names.values(), "loss", "±", "step", "time", "memory", "params", "adapter")
    rows = []
    for trial in mains:
        values = (
            shortened(text_of(trial.settings[name]), LONGEST_VALUE) if name in trial.settings else "" for name in names
        )
        state = (trial.state if trial.state not in ORDINARY else "",) if has_states else ()
        rows.append((trial.name.partition("-")[0], *values, *_loss(report, trial), *_figures(trial), *state))
    return [(*head, "") if has_states else head, *rows]


def _loss(report: SweepReport, trial: TrialReport) -> tuple[str, str]:
    standing = next((one for one in report.repeated if one.name == trial.name), None)
    if standing is not None and standing.deviation is not None:
        return f"{standing.loss:.4f}", f"{standing.deviation:.4f}"
    return "" if trial.loss is None else f"{trial.loss:.4f}", ""


def _figures(trial: TrialReport) -> tuple[str, ...]:
    memory, size = trial.peak_memory_bytes, trial.adapter_bytes
    return (
        str(trial.step),
        "" if trial.seconds is None else duration(trial.seconds),
        console.memory(memory) if memory else "",
        count(trial.trained_parameters) if trial.trained_parameters else "",
        console.memory(size) if size else "",
    )


def on_one_line(message: str) -> str:
    """Return the beginning of why a trial has failed."""
    return shortened(" ".join(message.split()), LONGEST_MESSAGE)


def count(number: int) -> str:
    """Return a number of parameters: 950, 18.3k, 1.2M."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g}{unit}"
    return str(number)
