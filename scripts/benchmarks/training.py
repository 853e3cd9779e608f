"""Compares `loratune sft` with plain TRL on the same rows: speed, memory, start-up, loss on unseen rows."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.processes import measure, printed_figures
from benchmarks.training_plot import plot_training

HERE = Path(__file__).parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="Alpaca rows")
    parser.add_argument("--rows", type=int, default=64, help="training rows, from the start of the file")
    parser.add_argument("--unseen", type=int, default=40, help="rows to score, from the end of the file")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument(
        "--quantization", choices=["none", "nf4"], default="none", help="quantisation of the base, with both programs"
    )
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--plot", type=Path, help="file for a plot")


def run(arguments: argparse.Namespace) -> None:
    """Train with both in alternation, score both, and print the table."""
    rows = json.loads(arguments.data.read_text(encoding="utf-8"))
    runs: dict[str, list[dict[str, Any]]] = {"TRL": [], "loratune": []}
    with tempfile.TemporaryDirectory(prefix="loratune-benchmark-") as place:
        train, unseen = Path(place) / "train.json", Path(place) / "unseen.json"
        train.write_text(json.dumps(rows[: arguments.rows]))
        unseen.write_text(json.dumps(rows[-arguments.unseen :]))
        for _ in range(arguments.runs):
            runs["TRL"].append(train_with_trl(arguments, train, Path(place) / "trl"))
            runs["loratune"].append(train_with_loratune(arguments, train, Path(place) / "loratune"))
        adapters = {"untrained": "none", "TRL": f"{place}/trl", "loratune": f"{place}/loratune/adapter"}
        score = {name: score_unseen(arguments.model, unseen, adapter) for name, adapter in adapters.items()}
    batch_tokens = round(runs["loratune"][0]["tokens"] / arguments.epochs / arguments.rows * arguments.batch)
    rate = printed_figures(HERE / "product_rate.py", arguments.model, batch_tokens)["tokens_per_second"]
    figures = {"runs": runs, "nll": score, "products_tokens_per_second": rate, "batch_tokens": batch_tokens}
    print_table(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2))
    if arguments.plot:
        plot_training(figures, arguments.plot)


def train_with_trl(arguments: argparse.Namespace, train: Path, place: Path) -> dict[str, Any]:
    """Return tokens without padding, seconds of train() and until the first step is done, losses, resident bytes."""
    settings = (arguments.batch, arguments.epochs, arguments.max_length, arguments.quantization)
    return printed_figures(HERE / "plain_trl.py", arguments.model, train, place, *settings)


def train_with_loratune(arguments: argparse.Namespace, train: Path, place: Path) -> dict[str, Any]:
    """Return the same figures for loratune, and its start-up stages."""
    flags = {
        "model.base": arguments.model, "model.quantization": arguments.quantization,
        "data.train": train, "data.validation": 0, "data.too_long": "truncate_answer",
        "lora.rank": 8, "lora.alpha": 16, "lora.dropout": 0, "training.batch_size": arguments.batch,
        "training.warmup": 0, "training.epochs": arguments.epochs, "training.max_length": arguments.max_length,
        "training.learning_rate": 2e-4, "output": place,
    }  # fmt: skip
    command = [sys.executable, "-m", "loratune", "sft", "--overwrite"]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    _, resident, _ = measure(command)
    report = json.loads((place / "report.json").read_text())
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    return {
        "tokens": report["tokens"],
        "seconds": lines[-1]["seconds"],
        "first_step": sum(report["start_up_seconds"].values()),
        "start_up": report["start_up_seconds"],
        "losses": [line["loss"] for line in lines if "loss" in line],
        "resident": resident,
    }


def score_unseen(model: Path, rows: Path, adapter: str) -> float:
    """Return nats per answer token, computed without loratune."""
    return float(printed_figures(HERE / "unseen_loss.py", model, adapter, rows)["nll"][0])


def print_table(figures: dict[str, Any]) -> None:
    """Print the speed of every run, the peak memory, and the start-up of the last run."""
    print("| | tokens/s | resident peak | first step after | nll on unseen rows |\n|---|---|---|---|---|")
    for name, runs in figures["runs"].items():
        every = ", ".join(f"{speed(one):.0f}" for one in runs)
        peak = max(one["resident"] for one in runs) / 1e9
        print(f"| {name} | {every} | {peak:.1f} GB | {runs[-1]['first_step']:.0f} s | {figures['nll'][name]:.4f} |")
    trl, own = (median_of([speed(one) for one in figures["runs"][name]]) for name in ("TRL", "loratune"))
    memory = [max(one["resident"] for one in figures["runs"][name]) for name in ("loratune", "TRL")]
    rate = figures["products_tokens_per_second"]
    stages = ", ".join(
        f"{name} {seconds:.1f} s" for name, seconds in figures["runs"]["loratune"][-1]["start_up"].items()
    )
    print(f"\nuntrained: nll {figures['nll']['untrained']:.4f}")
    print(f"{own / trl:.1f} times the tokens/s, {memory[0] / memory[1]:.0%} of the memory")
    print(
        f"matrix products of the frozen layers alone: {rate:.0f} tokens/s; "
        f"reached {own / rate:.0%} of it (TRL {trl / rate:.0%})"
    )
    print(f"start of loratune: {stages}")


def speed(one: dict[str, Any]) -> float:
    """Return tokens without padding per second, over all steps."""
    return float(one["tokens"] / one["seconds"])


def median_of(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
