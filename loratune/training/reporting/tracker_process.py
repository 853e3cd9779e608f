"""Runs one experiment tracker in a separate process, which follows metrics.jsonl; started by `trackers`.

Trackers use the network, start threads, and block at their end. In a separate process they can fail, hang or crash
without affecting training. The process ends when its standard input closes, which also happens if training is killed.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from loratune.recipe.yaml_reader import read_yaml

PROJECT = "loratune"
LOOK_SECONDS = 0.5
"""Interval for reading new metrics."""
Config = dict[str, str | int | float | bool | None]


class Tracker(NamedTuple):
    """The interface to a tracker."""

    log: Callable[[dict[str, float], int], Any]
    """Log values by name, with their step."""
    finish: Callable[[], Any]


def track(kind: str, title: str, recipe: str, metrics: str, logs: str, end_seconds: str) -> None:
    """Follow a run to its end.

    Args:
        kind: name of the tracker.
        title: the run's name in the tracker.
        recipe: path of the run's recipe.yaml.
        metrics: path of metrics.jsonl, which may not exist yet.
        logs: folder for the tracker's files.
        end_seconds: time for the tracker to finish after training has ended.
    """
    ended = _ended_with_input(int(end_seconds))
    tracker = OPENERS[kind](title, _flat(read_yaml(Path(recipe).read_text(encoding="utf-8")).values), Path(logs))
    for record in _records(Path(metrics), ended):
        step = int(record.pop("step"))
        tracker.log(record, step)
    tracker.finish()


def _ended_with_input(end_seconds: int) -> threading.Event:
    """Return an event that is set when standard input closes; the process then has a time limit."""
    ended, source = threading.Event(), os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # so that no tracker waits for keyboard input

    def wait() -> None:
        while os.read(source, 4096):
            pass
        signal.alarm(end_seconds)  # ends the process even if it blocks
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    return ended


def _records(metrics: Path, ended: threading.Event) -> Iterator[dict[str, float]]:
    """Yield all records of a run as they are written; incomplete lines wait."""
    read, rest = 0, b""
    while True:
        is_last_look = ended.is_set()
        if metrics.is_file():
            with metrics.open("rb") as file:
                file.seek(read)
                new = file.read()
            read += len(new)
            *lines, rest = (rest + new).split(b"\n")
            yield from map(json.loads, lines)
        if is_last_look:
            return
        ended.wait(LOOK_SECONDS)


def _flat(values: Any, prefix: str = "") -> Config:
    """Return settings by dotted name; lists become JSON strings."""
    found: Config = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
    return found


def _open_tensorboard(title: str, config: Config, logs: Path) -> Tracker:
    folder = logs / "tensorboard"
    shutil.rmtree(folder, ignore_errors=True)  # a resumed run is logged again from its first step
    writer = importlib.import_module("tensorboard.summary").Writer(str(folder))

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return Tracker(log, writer.close)


def _open_wandb(title: str, config: Config, logs: Path) -> Tracker:
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    run = importlib.import_module("wandb").init(project=project, name=title, config=config, dir=str(logs))
    return Tracker(lambda values, step: run.log(values, step=step), run.finish)


def _open_swanlab(title: str, config: Config, logs: Path) -> Tracker:
    swanlab = importlib.import_module("swanlab")
    project = os.environ.get("SWANLAB_PROJECT", PROJECT)
    swanlab.init(project=project, experiment_name=title, config=config, logdir=str(logs / "swanlab"))
    return Tracker(lambda values, step: swanlab.log(values, step=step), swanlab.finish)


def _open_trackio(title: str, config: Config, logs: Path) -> Tracker:
    trackio = importlib.import_module("trackio")
    trackio.init(project=os.environ.get("TRACKIO_PROJECT", PROJECT), name=title, config=config)
    return Tracker(lambda values, step: trackio.log(values, step=step), trackio.finish)


def _open_mlflow(title: str, config: Config, logs: Path) -> Tracker:
    mlflow = importlib.import_module("mlflow")
    mlflow.start_run(run_name=title)
    mlflow.log_params(config)
    return Tracker(lambda values, step: mlflow.log_metrics(values, step=step), mlflow.end_run)


OPENERS: dict[str, Callable[[str, Config, Path], Tracker]] = {
    "tensorboard": _open_tensorboard,
    "wandb": _open_wandb,
    "swanlab": _open_swanlab,
    "trackio": _open_trackio,
    "mlflow": _open_mlflow,
}
