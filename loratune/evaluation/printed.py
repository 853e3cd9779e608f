"""The layout of what `loratune eval --json` prints, for its JSON Schema."""

from __future__ import annotations

from typing import Annotated

from typing_extensions import NotRequired, TypedDict

from loratune.evaluation.result import Evaluation
from loratune.evaluation.tasks.result import TasksResult
from loratune.runs.typed_json import WRITTEN_BESIDE


class TasksFile(TypedDict):
    """eval_tasks.json."""

    program: str
    format_version: int
    result: Annotated[TasksResult, WRITTEN_BESIDE]


class RowsAndTasks(TypedDict):
    """eval.json, and the tasks if there were any."""

    program: str
    format_version: int
    evaluation: Annotated[Evaluation, WRITTEN_BESIDE]
    benchmarks: NotRequired[TasksFile]


class TasksAlone(TypedDict):
    """Without --tests."""

    benchmarks: TasksFile
