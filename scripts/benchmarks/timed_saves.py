"""Program of the benchmark `save`: trains, times every step and save, and prints the figures.

timed_saves.py MODEL DATA STEPS_BETWEEN STEPS FOLDER
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loratune.cli.app import app
from loratune.training.checkpoints.keeper import CheckpointKeeper
from loratune.training.trainer import AdapterTrainer

seconds: dict[str, list[float]] = {"write": [], "keep": [], "step": []}


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function to record its duration."""

    def measured(*arguments: Any, **settings: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments, **settings)
        seconds[name].append(time.perf_counter() - start)
        return result

    return measured


def main() -> None:
    model, data, between, steps, folder = sys.argv[1:]
    AdapterTrainer._save_checkpoint = timed("write", AdapterTrainer._save_checkpoint)
    CheckpointKeeper.on_save = timed("keep", CheckpointKeeper.on_save)
    AdapterTrainer._run_epoch = timed("step", AdapterTrainer._run_epoch)  # whole epochs: everything that steps do
    flags = {
        "model.base": model, "data.train": data, "data.validation": 0, "training.steps": steps,
        "checkpoints.every_steps": between, "output": f"{folder}/run",
        "data.placeholders": ["name=Robin", "author=Ann"],
    }  # fmt: skip
    lists = {name: given if isinstance(given, list) else [given] for name, given in flags.items()}
    line = [f"--{name}={value}" for name, values in lists.items() for value in values]
    app(["sft", *line], standalone_mode=False)
    saves = [write + keep for write, keep in zip(seconds["write"], seconds["keep"], strict=True)]
    checkpoint = next(Path(folder, "run", "checkpoints").iterdir())
    figures = {
        "save_seconds": saves,
        "keep_seconds": seconds["keep"],
        "step_seconds": (sum(seconds["step"]) - sum(saves)) / int(steps),
        "bytes": sum(path.stat().st_size for path in checkpoint.iterdir()),
    }
    print("FIGURES" + json.dumps(figures))


if __name__ == "__main__":
    main()
