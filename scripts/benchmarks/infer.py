"""Compares `loratune infer` with plain transformers: throughput on many prompts, and time to first token."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.processes import measure, printed_figures

PLAIN = Path(__file__).parent / "plain_generate.py"
QUESTION = "Tell me about the sea."
SUBJECTS = ("rivers", "volcanoes", "the history of bread", "how bicycles stay upright")
TASKS = (
    "Write a long story about {}.",
    "Explain {} to a child, step by step, with many examples.",
    "List everything that you know about {}. Begin with what most people do not know, and give reasons for each point.",
    "A friend of mine has to give a talk about {} at school next week. She has ten minutes, no pictures, and a class "
    "that would rather be outside. Write the talk for her, word by word.",
    "详细介绍一下{}。",
    "What would happen if there were no {} any more?",
    "Compare {} with something else and go into all details.",
    "Write a detailed report on {} with an introduction, five sections and a summary.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.add_argument("--model", required=True, help="folder, or tiny-qwen")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--batch", type=int, default=8, help="of transformers.generate")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for all figures")


def run(arguments: argparse.Namespace) -> None:
    """Run both programs in alternation, and print the tables."""
    folder = plain_folder(arguments.model)
    many: dict[str, list[dict[str, Any]]] = {"transformers": [], "loratune": []}
    first: dict[str, list[float]] = {"transformers": [], "loratune": []}
    with tempfile.TemporaryDirectory(prefix="loratune-benchmark-") as place:
        prompts = Path(place) / "prompts.jsonl"
        rows = [{"prompt": task.format(subject)} for task in TASKS for subject in SUBJECTS]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for _ in range(arguments.runs):
            many["transformers"].append(
                printed_figures(PLAIN, "batches", folder, prompts, arguments.batch, arguments.tokens)
            )
            many["loratune"].append(answer_with_loratune(arguments, prompts, Path(place)))
        for program in first:
            seconds_to_first(program, arguments.model, folder)  # brings the files into memory
        for _ in range(arguments.runs):
            for program, all_ in first.items():
                all_.append(seconds_to_first(program, arguments.model, folder))
    figures = {"many": many, "first_token_seconds": first}
    print_tables(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False))


def plain_folder(model: str) -> str:
    """Return the model's folder for transformers."""
    from loratune.model.files import find_base
    from loratune.recipe.sections import ModelSettings

    return str(find_base(ModelSettings(base=model)))


def answer_with_loratune(arguments: argparse.Namespace, prompts: Path, place: Path) -> dict[str, Any]:
    """Return tokens, seconds, answers and resident memory of `loratune infer --input`."""
    output, log = place / "answers.jsonl", place / "log"
    flags = ["--input", prompts, "--output", output, "--max-new-tokens", arguments.tokens, "--overwrite", "--json"]
    command = [sys.executable, "-m", "loratune", "infer", "--model", arguments.model, *map(str, flags)]
    _, resident, _ = measure(command, log)
    summary = json.loads(log.read_text()[log.read_text().index("{") :])
    answers = [json.loads(line)["answer"] for line in output.read_text(encoding="utf-8").splitlines()]
    return {key: summary[key] for key in ("tokens", "seconds")} | {"answers": answers, "resident": resident}


def seconds_to_first(program: str, model: str, folder: str) -> float:
    """Return the seconds from the start of the process to the first byte of its answer."""
    commands = {
        "transformers": [str(PLAIN), "first", folder, QUESTION],
        "loratune": ["-m", "loratune", "infer", "--model", model, "--prompt", QUESTION, "--max-new-tokens", "4"],
    }
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *commands[program]], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    )
    seen = process.stdout.read(1)
    seconds = time.perf_counter() - start
    process.communicate()
    if process.returncode or not seen.strip():
        sys.exit(f"{program} gave no answer")
    return seconds


def print_tables(figures: dict[str, Any]) -> None:
    """Print speed and memory of every run, medians, and the number of equal answers."""
    many, first = figures["many"], figures["first_token_seconds"]
    print(
        "| | tokens/s, median (all) | tokens | resident peak | first token after, median (all) |\n|---|---|---|---|---|"
    )
    for program, runs in many.items():
        speeds = [one["tokens"] / one["seconds"] for one in runs]
        peak = max(one["resident"] for one in runs) / 1e9
        waits = ", ".join(f"{wait:.2f}" for wait in first[program])
        print(
            f"| {program} | {statistics.median(speeds):.1f} ({', '.join(f'{speed:.1f}' for speed in speeds)}) | "
            f"{runs[-1]['tokens']} | {peak:.2f} GB | {statistics.median(first[program]):.2f} s ({waits}) |"
        )
    speed = {name: statistics.median(one["tokens"] / one["seconds"] for one in runs) for name, runs in many.items()}
    wait = {name: statistics.median(waits) for name, waits in first.items()}
    pairs = list(zip(many["loratune"][-1]["answers"], many["transformers"][-1]["answers"], strict=True))
    print(
        f"\n{speed['loratune'] / speed['transformers']:.2f} times the tokens/s, "
        f"{wait['loratune'] / wait['transformers']:.2f} times the wait for the first token; "
        f"{sum(own.strip() == plain.strip() for own, plain in pairs)} of {len(pairs)} answers are the same"
    )
