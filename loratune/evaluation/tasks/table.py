"""Shows the scores of tasks in the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from loratune import console
from loratune.errors import counted
from loratune.evaluation.tasks.result import Metric, TasksResult
from loratune.evaluation.tasks.scores import ADAPTER, BASE


def show_tasks(result: TasksResult) -> None:
    """Show the scores as a table, and how many answers were cut."""
    lines: list[tuple[str, ...]] = [("", BASE, ADAPTER, "difference")]
    shown = [(one.name, one.metrics) for one in result.groups] + [(one.name, one.metrics) for one in result.tasks]
    lines += [(f"{name} {metric.name}", *_figures(metric)) for name, metrics in shown for metric in metrics]
    console.comparison(lines)
    for task in result.tasks:
        for side, answers in task.generated.items():
            of = f"of {counted(answers.answers, 'answer')} ({side})"
            if answers.cut:
                console.warn(
                    f"{task.name}: {answers.cut} {of} cut by the limit of new tokens; --max-new-tokens raises it, "
                    "unless the task has its own"
                )
            if answers.too_long:
                console.warn(f"{task.name}: {answers.too_long} {of} empty: the prompt does not fit into the context")


def _figures(metric: Metric) -> Iterator[str]:
    for one, sign in ((metric.base, ""), (metric.adapter, ""), (metric.difference, "+")):
        yield f"{one.value:{sign}.4f}" + ("" if one.stderr is None else f" ± {one.stderr:.4f}")
