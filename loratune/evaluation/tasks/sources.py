"""Finds the tasks of a command line: in a folder of the user, else among those of the harness."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import yaml
from jinja2 import StrictUndefined
from jinja2.sandbox import SandboxedEnvironment

from loratune import console
from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.nearest import nearest
from loratune.plain_files import read_plain_text, require_folder

CODE_TAG = "!function"
"""The harness imports what a YAML file names with it."""
FILE_BYTES = 1_000_000


def load_tasks(names: Sequence[str], folder: Path | None) -> dict[str, Any]:
    """Load tasks and their rows; the members of a group or tag are tasks of their own.

    Args:
        names: names of tasks, groups or tags.
        folder: a folder with YAML files of further tasks, whose names come first.

    Returns:
        What the harness's `evaluate` takes.

    Raises:
        LoratuneError: a name is unknown, a YAML file or a metric would run code, or rows cannot be loaded.
    """
    if folder is not None:
        _require_no_code(folder)
    import datasets
    from lm_eval import utils
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    utils.env = _sandboxed(utils.env)
    manager = TaskManager(include_path=str(folder), include_defaults=False) if folder else None
    if manager is None or not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=str(folder) if folder else None)  # it reads some ten thousand files
    _require_known(names, manager.all_tasks, folder)
    try:
        with console.status(f"loading {', '.join(names)}"), _only_own_metrics() if folder else nullcontext():
            loaded: dict[str, Any] = manager.load(list(names))
    except Exception as error:  # what libraries of rows raise may be anything
        raise LoratuneError(
            f"{', '.join(names)}: the tasks or their rows cannot be loaded: {error or type(error).__name__}", Exit.DATA
        ) from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


@contextmanager
def _only_own_metrics() -> Iterator[None]:
    """Refuse metrics that the harness does not have.

    It passes their names to the library evaluate, which imports a module of that name from a folder or the hub.
    """
    from lm_eval.api import task
    from lm_eval.api.registry import METRIC_REGISTRY

    plain = task.get_metric

    def own_metric(name: str, hf_evaluate_metric: bool = False) -> Any:
        if hf_evaluate_metric or name not in METRIC_REGISTRY:
            raise LoratuneError(
                f"metric {name} would be imported by the library evaluate, and with --tasks-folder only the harness's "
                f"own run: {', '.join(sorted(METRIC_REGISTRY))}",
                Exit.DATA,
            )
        return plain(name)

    task.get_metric = own_metric
    try:
        yield
    finally:
        task.get_metric = plain


def _sandboxed(environment: Any) -> SandboxedEnvironment:
    """Return what renders the templates of tasks without letting them call whatever Python has."""
    sandbox = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    sandbox.filters.update(environment.filters)
    return sandbox


def _require_known(names: Sequence[str], known: Sequence[str], folder: Path | None) -> None:
    unknown = [name for name in names if name not in known]
    if not unknown:
        return
    lines = []
    for name in unknown:
        near = nearest(name, known)
        lines.append(f"{name}: {f'did you mean {near}?' if near else 'no task, group or tag is called that'}")
    places = f"lm-evaluation-harness or {folder}" if folder else "lm-evaluation-harness"
    raise LoratuneError(f"unknown tasks; {places} has them by name:\n{bullet_list(lines)}", Exit.USAGE)


def _require_no_code(folder: Path) -> None:
    """Refuse a folder whose files would run code: the harness would import it as soon as a task is loaded.

    Raises:
        LoratuneError: lists every such place.
    """
    require_folder(folder, "a folder of tasks")
    problems = [problem for path in sorted(folder.rglob("*.yaml")) for problem in _problems(path, folder)]
    if problems:
        raise LoratuneError(f"{folder}: only tasks that run no code are loaded:\n{bullet_list(problems)}", Exit.DATA)


def _problems(path: Path, folder: Path) -> Iterator[str]:
    try:
        root = yaml.compose(read_plain_text(path, FILE_BYTES), Loader=yaml.SafeLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        yield f"{path}: cannot be read: {' '.join(str(error).split())}"
        return
    for node in _nodes(root):
        line = f"{path}:{node.start_mark.line + 1}"
        if node.tag == CODE_TAG:
            yield f"{line}: {CODE_TAG} {getattr(node, 'value', '')}"
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == "include":
                    yield from _outside(line, path, value, folder)


def _outside(line: str, path: Path, included: yaml.Node, folder: Path) -> Iterator[str]:
    """Yield files that are included from elsewhere, which were not looked at."""
    names = included.value if isinstance(included, yaml.SequenceNode) else [included]
    for name in names:
        if not (path.parent / name.value).resolve().is_relative_to(folder.resolve()):
            yield f"{line}: includes {name.value}, which is outside the folder"


def _nodes(node: yaml.Node | None) -> Iterator[yaml.Node]:
    """Yield a node and all below it; an alias is the node that it stands for."""
    seen, waiting = set[int](), [node]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, yaml.MappingNode):
            waiting += [part for pair in one.value for part in pair]
        elif isinstance(one, yaml.SequenceNode):
            waiting += one.value
