"""What a sweep prints: a line for each result as it comes, and the closing table, within 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from statistics import fmean

from loratune import console
from loratune.errors import counted
from loratune.printable import shortened
from loratune.sweep.definition import Sweep
from loratune.sweep.plan import Trial, judged
from loratune.sweep.price import duration, measured
from loratune.sweep.report import NATS, Standing, SweepReport, TrialReport
from loratune.sweep.space import described, short_names, text_of
from loratune.training.steps import step_of

COLUMNS = 80
GAP = "  "
"""Behind each column of a table."""
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
        exact = f" {newest.exact:.0%}" if judged(newest, sweep.plan.best_by) == "exact" else ""
        end = f"step {newest.step}/{newest.steps}  {newest.loss:.4f}{exact}  {duration(newest.seconds)}, {left} left"
    else:
        return
    seed = "" if trial.seed is None else f", seed {trial.seed}"
    settings = shortened(described(trial.settings), SETTINGS_WIDTH - len(seed)) + seed
    line = f"{trial.number:02d}  {settings:<{SETTINGS_WIDTH}}  {end}"
    if not trial.failure and len(line) > COLUMNS:  # blanks are left out before the time left is
        line = f"{trial.number:02d}  {settings:<{max(0, SETTINGS_WIDTH - len(line) + COLUMNS)}}  {end}"
    console.say(shortened(line, COLUMNS))


def show_sweep(report: SweepReport) -> None:
    """Print the closing table, the failures, and the sentence."""
    for part in _parts(rows_of(report)):
        console.comparison(part)
    for trial in report.trials:
        if trial.message:
            console.warn(f"{trial.name} {trial.state}: {on_one_line(trial.message)}")
    if report.sentence:
        console.say(report.sentence, style="bold")


def _parts(rows: list[tuple[str, ...]]) -> list[list[tuple[str, ...]]]:
    """Return a table that fits the terminal as it is, and else what was measured and what it cost as two tables."""
    width = sum(max(map(len, column)) + len(GAP) for column in zip(*rows, strict=True))
    if width <= COLUMNS:
        return [rows]
    place = rows[0].index("forgot") + 1
    return [[row[:place] for row in rows], [(row[0], *row[place:]) for row in rows]]


def rows_of(report: SweepReport) -> list[tuple[str, ...]]:
    """Return the table: a header, and a row for each trial; repetitions are in the row of theirs.

    States that are not ordinary, steps that differ and exact answers that decide have columns only where there are any.
    """
    names, mains = short_names(list(report.over)), [trial for trial in report.trials if trial.repeats is None]
    columns = [("no.", [trial.name.partition("-")[0] for trial in mains])]
    columns += [(short, [_value(trial, name) for trial in mains]) for name, short in names.items()]
    if report.ranked_by == "exact":
        columns.append(("exact", [_exact(report, trial) for trial in mains]))
    losses = [_loss(report, trial) for trial in mains]
    columns.append(("loss" if report.unit == NATS else "bits/byte", [loss for loss, _ in losses]))
    columns += [("±", [spread for _, spread in losses]), ("forgot", [_forgetting(report, trial) for trial in mains])]
    if len({trial.step for trial in mains}) > 1:
        columns.append(("step", [str(trial.step) for trial in mains]))
    columns += [(name, [figure(trial) for trial in mains]) for name, figure in FIGURES.items()]
    if any(trial.state not in ORDINARY for trial in mains):
        columns.append(("", [trial.state if trial.state not in ORDINARY else "" for trial in mains]))
    head, cells = zip(*columns, strict=True)
    return [head, *zip(*cells, strict=True)]


def _value(trial: TrialReport, name: str) -> str:
    """Return a trial's value of a setting; of a path that is too long, its last part."""
    text = text_of(trial.settings[name]) if name in trial.settings else ""
    return text if len(text) <= LONGEST_VALUE else shortened(text.rpartition("/")[2], LONGEST_VALUE)


def _standing(report: SweepReport, trial: TrialReport) -> Standing | None:
    return next((one for one in report.repeated if one.name == trial.name), None)


def _loss(report: SweepReport, trial: TrialReport) -> tuple[str, str]:
    standing = _standing(report, trial)
    if standing is not None and standing.deviation is not None:
        return f"{standing.loss:.4f}", f"{standing.deviation:.4f}"
    return "" if trial.loss is None else f"{trial.loss:.4f}", ""


def _exact(report: SweepReport, trial: TrialReport) -> str:
    standing = _standing(report, trial)
    exact = trial.exact if standing is None else standing.exact
    return "" if exact is None else f"{exact:.1%}"


def _forgetting(report: SweepReport, trial: TrialReport) -> str:
    """Return the rise of the language that was forgotten most, mean over the seeds."""
    alike = [one.forgetting for one in report.trials if trial.name in (one.name, one.repeats)]
    rises = [max(one.values()) for one in alike if one]
    return f"{fmean(rises):+.3f}" if rises else ""


FIGURES: dict[str, Callable[[TrialReport], str]] = {
    "time": lambda trial: "" if trial.seconds is None else duration(trial.seconds),
    "memory": lambda trial: console.memory(trial.peak_memory_bytes) if trial.peak_memory_bytes else "",
    "params": lambda trial: count(trial.trained_parameters) if trial.trained_parameters else "",
    "adapter": lambda trial: console.memory(trial.adapter_bytes) if trial.adapter_bytes else "",
}
"""Column → what a trial has there."""


def on_one_line(message: str) -> str:
    """Return the beginning of why a trial has failed."""
    return shortened(" ".join(message.split()), LONGEST_MESSAGE)


def count(number: int) -> str:
    """Return a number of parameters: 950, 18.3k, 1.2M."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g}{unit}"
    return str(number)
