"""eval_tasks.json: the scores of benchmark tasks. It is typed, and read and written here alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from loratune.runs.typed_json import read_typed
from loratune.writing import PROGRAM, write_json

TASKS_RESULT = "eval_tasks.json"
TASKS_VERSION = 1


@dataclass(frozen=True)
class Generated:
    """What became of the answers of a generating task."""

    answers: int = 0
    cut: int = 0
    """Ended by the limit of new tokens."""
    too_long: int = 0
    """Without an answer, because the prompt does not fit into the context; they count as empty answers."""

    def plus(self, is_cut: bool | None) -> Generated:
        """Return the counts with one more answer; None for a prompt that is too long."""
        return replace(
            self,
            answers=self.answers + 1,
            cut=self.cut + (is_cut is True),
            too_long=self.too_long + (is_cut is None),
        )

    @property
    def cut_share(self) -> float:
        """Share of the answers that were cut."""
        return self.cut / self.answers if self.answers else 0.0


@dataclass(frozen=True)
class Score:
    """A metric of one model."""

    value: float
    stderr: float | None
    """As the harness estimates it; None where it does not."""


@dataclass(frozen=True)
class Metric:
    """A metric of a task, for the adapter and its base."""

    name: str
    """The metric, and the filter of the answers if it is not `none`: `exact_match,strict-match`."""
    higher_is_better: bool | None
    """None where the harness does not say."""
    adapter: Score
    base: Score
    difference: Score
    """Adapter minus base; its error is that of the paired differences of the rows, None where rows have no values."""


@dataclass(frozen=True)
class TaskResult:
    """The results of a task."""

    name: str
    version: str | None
    """Of the task's definition; None if it does not say."""
    rows: int
    """How many were asked."""
    all_rows: int
    fewshot: int
    metrics: tuple[Metric, ...]
    generated: Mapping[str, Generated] = field(default_factory=dict)
    """`adapter` and `base` → their answers; empty for tasks that only score given texts."""


@dataclass(frozen=True)
class GroupResult:
    """What the harness makes of the scores of a group's tasks."""

    name: str
    members: tuple[str, ...]
    """Tasks and groups."""
    metrics: tuple[Metric, ...]


@dataclass(frozen=True)
class TasksResult:
    """The results of all tasks."""

    adapter: str
    base: str
    template: str | None
    """The run's template, in which the questions were asked; None if they were asked as they are."""
    template_arguments: Mapping[str, Any]
    """Of the chat template, such as whether the model reasons."""
    limit: int | None
    tasks: tuple[TaskResult, ...]
    groups: tuple[GroupResult, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """In JSON types, in the file's layout."""
        return {"program": PROGRAM, "format_version": TASKS_VERSION, **asdict(self)}


def write_tasks(output: Path, result: TasksResult) -> None:
    """Write the results into an output folder, which is created if need be."""
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / TASKS_RESULT, result.values())


def read_tasks(output: Path) -> TasksResult:
    """Read the results of an output folder; keys that this version does not know are left out.

    Raises:
        LoratuneError: the file is missing, damaged, or written by a later version of loratune.
    """
    return read_typed(TasksResult, output / TASKS_RESULT, TASKS_VERSION)
