"""Puts together what the harness has found for an adapter and for its base."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratune.evaluation.tasks.result import Generated, GroupResult, Metric, Score, TaskResult

ADAPTER, BASE = "adapter", "base"
ERROR = "_stderr"
WITHOUT_FILTER = "none"


@dataclass(frozen=True)
class Side:
    """What the harness has found for one model."""

    scores: Mapping[str, Mapping[str, Any]]
    """Task → its metrics, by `metric,filter` and `metric_stderr,filter`."""
    samples: Mapping[str, Sequence[Mapping[str, Any]]]
    counts: Mapping[str, Mapping[str, int]]
    """Task → `original` and `effective` number of rows."""
    better: Mapping[str, Mapping[str, bool]]
    """Task → metric → whether a higher value is better."""
    generated: Mapping[str, Generated]


def task_results(loaded: Mapping[str, Any], sides: Mapping[str, Side]) -> tuple[TaskResult, ...]:
    """Return the results of each task.

    Args:
        loaded: the tasks, as the harness has loaded them.
        sides: ADAPTER and BASE → what was found.
    """
    return tuple(_task_result(name, task, sides) for name, task in loaded["tasks"].items())


def group_results(loaded: Mapping[str, Any], sides: Mapping[str, Side]) -> tuple[GroupResult, ...]:
    """Return the results of each group, which has no rows of its own; see `task_results`."""
    return tuple(
        GroupResult(name, tuple(group.child_names), tuple(_metrics(name, sides)))
        for name, group in loaded["groups"].items()
    )


def _task_result(name: str, task: Any, sides: Mapping[str, Side]) -> TaskResult:
    counts, version = sides[ADAPTER].counts[name], (task.config.metadata or {}).get("version")
    return TaskResult(
        name=name,
        version=None if version is None else str(version),
        rows=counts["effective"],
        all_rows=counts["original"],
        fewshot=int(task.get_config("num_fewshot")),
        metrics=tuple(_metrics(name, sides)),
        generated={side: found.generated[name] for side, found in sides.items() if name in found.generated},
    )


def _metrics(name: str, sides: Mapping[str, Side]) -> Iterator[Metric]:
    for key, value in sides[ADAPTER].scores.get(name, {}).items():
        metric, _, answers_filter = key.partition(",")
        if not answers_filter or metric.endswith(ERROR) or not isinstance(value, int | float):
            continue
        adapter, base = (_score(sides[side].scores[name], metric, answers_filter) for side in (ADAPTER, BASE))
        yield Metric(
            name=metric if answers_filter == WITHOUT_FILTER else key,
            higher_is_better=sides[ADAPTER].better.get(name, {}).get(metric),
            adapter=adapter,
            base=base,
            difference=Score(adapter.value - base.value, _paired_error(name, metric, answers_filter, sides)),
        )


def _score(found: Mapping[str, Any], metric: str, answers_filter: str) -> Score:
    error = found.get(f"{metric}{ERROR},{answers_filter}")
    return Score(float(found[f"{metric},{answers_filter}"]), float(error) if isinstance(error, int | float) else None)


def _paired_error(name: str, metric: str, answers_filter: str, sides: Mapping[str, Side]) -> float | None:
    """Return the standard error of the mean difference between the two models on the same rows."""
    if name not in sides[ADAPTER].samples:  # a group
        return None
    values = [
        {one["doc_id"]: one[metric] for one in found.samples[name] if one["filter"] == answers_filter}
        for found in (sides[ADAPTER], sides[BASE])
    ]
    numbers = [value for rows in values for value in rows.values()]
    if len(values[0]) < 2 or not all(isinstance(value, int | float) for value in numbers):
        return None
    means = [sides[side].scores[name][f"{metric},{answers_filter}"] for side in (ADAPTER, BASE)]
    if not all(math.isclose(statistics.fmean(rows.values()), mean) for rows, mean in zip(values, means, strict=True)):
        return None  # the task does not take the mean
    differences = [float(values[0][row]) - float(values[1][row]) for row in values[0]]
    return statistics.stdev(differences) / math.sqrt(len(differences))
