"""Measures the cost of a checkpoint: time of a save, relative to the steps between two saves."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.processes import printed_figures
from benchmarks.training import median_of

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = Path(__file__).parent / "timed_saves.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.add_argument("--model", default="tiny-qwen")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "identity.json")
    parser.add_argument("--between", type=int, default=50, help="steps between two checkpoints")
    parser.add_argument("--saves", type=int, default=3)


def run(arguments: argparse.Namespace) -> None:
    """Train until some checkpoints are saved, and print the cost of each."""
    steps = arguments.between * arguments.saves
    with tempfile.TemporaryDirectory(prefix="loratune-benchmark-") as place:
        figures = printed_figures(PROGRAM, arguments.model, arguments.data, arguments.between, steps, place)
    saves, step = figures["save_seconds"], figures["step_seconds"]
    save = median_of(saves)
    print(
        "| step | save | of it reading back and removing | size | share of the steps between |\n|---|---|---|---|---|"
    )
    print(
        f"| {step * 1000:.0f} ms | {save * 1000:.0f} ms | {median_of(figures['keep_seconds']) * 1000:.0f} ms | "
        f"{figures['bytes'] / 1e6:.1f} MB | {save / (arguments.between * step):.2%} |"
    )
    every = ", ".join(f"{seconds * 1000:.0f}" for seconds in saves)
    print(f"\n{arguments.model}, a checkpoint every {arguments.between} steps; the saves in milliseconds: {every}")
