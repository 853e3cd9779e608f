"""Measures how `loratune sft` scales: time per token with the number of rows, memory with their length."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from benchmarks.processes import measure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="Alpaca rows")
    parser.add_argument("--rows", type=int, nargs="*", default=[100, 1000, 10_000])
    parser.add_argument("--steps", type=int, default=50, help="steps of each run of the first table")
    parser.add_argument("--lengths", type=int, nargs="*", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--json", type=Path, help="file for all figures")


def run(arguments: argparse.Namespace) -> None:
    """Print two tables."""
    rows = json.loads(arguments.data.read_text(encoding="utf-8"))
    figures: dict[str, list[dict[str, Any]]] = {"rows": [], "lengths": []}
    with tempfile.TemporaryDirectory(prefix="loratune-benchmark-") as place:
        if arguments.rows:
            print("| rows | tokens/s | ms a token | before the first step | resident peak |\n|---|---|---|---|---|")
        for count in arguments.rows:
            figures["rows"].append(
                found := train_on(arguments, many(rows, count), Path(place), arguments.steps, 8, 512)
            )
            print_rows(count, found)
        if arguments.lengths:
            print("\n| tokens of a row | peak, activations kept | computed again |\n|---|---|---|")
        for length in arguments.lengths:
            long_rows = [joined(rows, start, length) for start in range(0, 40, 10)]
            kept, again = (
                train_on(arguments, long_rows, Path(place), 3, 1, length, flag)
                for flag in ("--no-training.gradient_checkpointing", "--training.gradient_checkpointing")
            )
            figures["lengths"].append({"length": length, "kept": kept, "again": again})
            print(f"| {length} | {kept['resident'] / 1e9:.2f} GB | {again['resident'] / 1e9:.2f} GB |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2))


def many(rows: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    """Return `count` distinct rows."""
    return [row | {"instruction": f"{row['instruction']} ({n})"} for n, row in enumerate(islice(cycle(rows), count))]


def joined(rows: list[dict[str, str]], start: int, tokens: int) -> dict[str, str]:
    """Return a row of at least `tokens` tokens, assuming at most ten characters per token."""
    answers: list[str] = []
    for row in islice(cycle(rows), start, None):
        answers.append(row["output"])
        if sum(map(len, answers)) > 10 * tokens:
            break
    return {"instruction": rows[start]["instruction"], "output": "\n".join(answers)}


def train_on(
    arguments: argparse.Namespace,
    rows: list[dict[str, str]],
    place: Path,
    steps: int,
    batch: int,
    max_length: int,
    *flags: str,
) -> dict[str, Any]:
    """Return the figures of a run; seconds and tokens exclude the first step."""
    (place / "rows.json").write_text(json.dumps(rows))
    settings = {
        "model.base": arguments.model, "data.train": place / "rows.json", "data.validation": 0,
        "data.too_long": "truncate_answer", "lora.rank": 8, "lora.alpha": 16, "lora.dropout": 0,
        "training.batch_size": batch, "training.steps": steps, "training.max_length": max_length,
        "checkpoints.every_steps": 1000, "output": place / "run",
    }  # fmt: skip
    command = [sys.executable, "-m", "loratune", "sft", "--overwrite", *flags]
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    _, resident, _ = measure(command)
    lines = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    start_up = json.loads((place / "run" / "report.json").read_text())["start_up_seconds"]
    return {
        "tokens": lines[-1]["tokens"] - lines[0]["tokens"],
        "seconds": lines[-1]["seconds"] - lines[0]["seconds"],
        "before_first_step": sum(start_up.values()) - start_up["first step"],
        "resident": resident,
    }


def print_rows(count: int, found: dict[str, Any]) -> None:
    """Print a line of the first table."""
    each = found["seconds"] / found["tokens"]
    resident = f"{found['resident'] / 1e9:.2f} GB"
    print(
        f"| {count:,} | {1 / each:.0f} | {1000 * each:.2f} | {found['before_first_step']:.0f} s | {resident} |",
        flush=True,
    )
