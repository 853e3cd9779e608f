"""Asks an adapter and its base the same benchmark tasks, and writes their scores."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError

from loratune import console
from loratune.engine.engine import Engine, load_engine
from loratune.engine.sampling import Sampling
from loratune.engine.types import GREEDY
from loratune.errors import Exit, LoratuneError, first_line_of
from loratune.evaluation.tasks.result import TasksResult, write_tasks
from loratune.evaluation.tasks.scores import ADAPTER, BASE, Side, group_results, task_results
from loratune.evaluation.tasks.sources import load_tasks
from loratune.extras import required
from loratune.runs.versions import library_versions
from loratune.writing import disk_errors_explained, try_to_write

SEED = 1234
"""Of the examples that are shown before a question, as in the harness."""


@dataclass(frozen=True)
class TasksRequest:
    """The tasks, the adapter that is asked, and the settings."""

    tasks: tuple[str, ...]
    """Names of tasks, groups or tags."""
    output: Path
    """Folder of the results."""
    adapter: Path
    model: str | None = None
    """Where the base lies now; None for the recorded place."""
    folder: Path | None = None
    """A folder with YAML files of further tasks."""
    limit: int | None = None
    """Maximum number of rows of a task."""
    uses_template: bool = True
    """Whether questions are rendered with the run's chat template."""
    sampling: Sampling = GREEDY
    """What tasks leave open."""
    force: bool = False


def find_tasks(request: TasksRequest) -> dict[str, Any]:
    """Load the tasks with their rows, and look whether the results can be written.

    Raises:
        LoratuneError: the harness is not installed, or see `load_tasks`.
    """
    with required("--tasks", "eval", package="lm-eval"):
        import lm_eval  # noqa: F401
    loaded = load_tasks(request.tasks, request.folder)
    with disk_errors_explained(request.output):
        is_new = not request.output.exists()
        request.output.mkdir(parents=True, exist_ok=True)
        try_to_write(request.output)
        if is_new:  # `runs list` would have nothing to say of an empty folder until there are scores
            request.output.rmdir()
    return loaded


def run_tasks(request: TasksRequest, loaded: dict[str, Any]) -> TasksResult:
    """Ask an adapter and its base the tasks, and write eval_tasks.json.

    Args:
        request: the tasks and the adapter.
        loaded: the tasks, from `find_tasks`.

    Raises:
        LoratuneError: a task cannot be asked, or the adapter is invalid.
    """
    with console.status(f"loading {request.adapter}"):
        engine = load_engine([(ADAPTER, request.adapter)], request.model, request.force)
    for warning in engine.warnings:
        console.warn(warning)
    with closing(engine):
        sides = {name: _asked(engine, loaded, request, name == ADAPTER) for name in (ADAPTER, BASE)}
        result = _result(engine, loaded, request, sides)
    with disk_errors_explained(request.output):
        write_tasks(request.output, result)
    return result


def _asked(engine: Engine, loaded: dict[str, Any], request: TasksRequest, use_adapter: bool) -> Side:
    from lm_eval.evaluator import evaluate

    from loratune.evaluation.tasks.harness_model import HarnessModel

    console.say(f"asking {'the adapter' if use_adapter else 'its base'}")
    model = HarnessModel(engine, ADAPTER, use_adapter, request.sampling)
    _seed(loaded)
    with _task_errors_explained(request), _without_bars():
        found = evaluate(
            model,
            loaded,
            limit=request.limit,
            apply_chat_template=request.uses_template,
            fewshot_as_multiturn=request.uses_template,
        )
    return Side(found["results"], found["samples"], found["n-samples"], found["higher_is_better"], model.generated)


def _seed(loaded: Mapping[str, Any]) -> None:
    """Have both models see the same examples before a question."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=SEED)


@contextmanager
def _task_errors_explained(request: TasksRequest) -> Iterator[None]:
    """Turn what the harness raises for a task's definition or rows into a message."""
    try:
        yield
    except (TemplateError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise LoratuneError(
            f"{', '.join(request.tasks)}: a task cannot be asked: {type(error).__name__}: {first_line_of(error, 300)}",
            Exit.DATA,
        ) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Leave the terminal to the console."""
    from lm_eval.api import task

    plain = task.tqdm
    task.tqdm = lambda rows, **_: rows
    try:
        yield
    finally:
        task.tqdm = plain


def _result(engine: Engine, loaded: Mapping[str, Any], request: TasksRequest, sides: Mapping[str, Side]) -> TasksResult:
    settings = engine.voices[ADAPTER].encoder.settings
    return TasksResult(
        adapter=str(request.adapter),
        base=engine.base_name,
        template=settings.template if request.uses_template else None,
        template_arguments=settings.template_arguments if request.uses_template else {},
        limit=request.limit,
        tasks=task_results(loaded, sides),
        groups=group_results(loaded, sides),
        versions=library_versions() | {"lm_eval": version("lm_eval")},
    )
