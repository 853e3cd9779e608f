"""Trains the shipped 7B recipes and asks their adapters on what is left of a card when only 23.5 GB are free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpu_checks import machine
from gpu_checks.commands import clocked, clocked_sft
from gpu_checks.models import random_model, write_rows
from gpu_checks.table import Figures, Workplace
from gpu_checks.training_speed import layers_of, shipped

FREE = 23.5e9
RECIPES = ("qwen7b", "qwen7b-qlora")
LENGTHS = tuple(range(100, 2001, 29))
STEPS = 4


def small_card(place: Workplace) -> Figures:
    """Return allocated and reserved memory of training and inference with each recipe, and how many failed."""
    folder = place.folder / "small-card"
    folder.mkdir(exist_ok=True)
    base, _ = random_model(place, layers_of(place))
    rows = write_rows(folder / "rows.json", LENGTHS)
    figures: dict[str, Any] = {}
    shares, failed = [], []
    with machine.only_free(FREE):
        for recipe in RECIPES:
            for name, measure in (("sft", trained), ("infer", asked)):
                try:
                    run = measure(folder / recipe, recipe, base, rows)
                except RuntimeError as error:
                    failed.append(f"{recipe}, {name}: {error}")
                    continue
                shares.append((run.reserved - run.allocated) / run.allocated)
                told = {"allocated GB": run.allocated / 1e9, "reserved GB": run.reserved / 1e9, "share": shares[-1]}
                figures |= {f"{recipe}, {name}: {key}": value for key, value in told.items()}
    return figures | {
        "failed commands": len(failed), "failed": failed, "largest fragmentation": max(shares, default=None)
    }  # fmt: skip


def trained(folder: Path, recipe: str, base: Path, rows: Path) -> Any:
    folder.mkdir(exist_ok=True)
    settings = shipped(base, rows) | {"training.max_steps": STEPS}
    return clocked_sft(folder, settings, "--config", recipe)


def asked(folder: Path, recipe: str, base: Path, rows: Path) -> Any:
    words = ["infer", "--adapter", folder / "run", "--prompt", "Who are you?", "--max-new-tokens", 64]
    return clocked(folder, ["-m", "loratune", *words])
