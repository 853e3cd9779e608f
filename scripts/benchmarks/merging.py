"""Compares `loratune merge` with PEFT's merge_and_unload and save_pretrained, and with cp and sync."""

from __future__ import annotations

import argparse
import shlex
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.processes import measure

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output)
AutoTokenizer.from_pretrained(base).save_pretrained(output)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True, help="run folder or plain PEFT folder")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--also", action="append", default=[], help="another program: NAME=COMMAND")
    parser.add_argument("--only-loratune", action="store_true")


def run(arguments: argparse.Namespace) -> None:
    """Run every program in alternation, and print the table."""
    base, adapter = arguments.base.resolve(), arguments.adapter.resolve()
    peft_folder = adapter / "adapter" if (adapter / "adapter").is_dir() else adapter
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".benchmark-") as place:
        output = Path(place) / "merged"
        ours = [sys.executable, "-m", "loratune", "merge", "--adapter", str(adapter), "--base-model", str(base)]
        commands = {
            "cp and sync": ["sh", "-c", f"cp -r {shlex.quote(str(base))} {shlex.quote(str(output))} && sync"],
            "loratune merge, files proved": [*ours, "--output", str(output), "--no-logits"],
            "loratune merge, files and logits proved": [*ours, "--output", str(output)],
            "PEFT merge_and_unload, save_pretrained": [
                sys.executable, "-c", PEFT, str(base), str(peft_folder), str(output)
            ],
        }  # fmt: skip
        if arguments.only_loratune:
            commands = {name: command for name, command in commands.items() if name.startswith("loratune")}
        for also in arguments.also:
            name, _, command = also.partition("=")
            commands[name] = shlex.split(command.format(base=base, adapter=peft_folder, output=output))
        figures: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
        for _ in range(arguments.runs):
            for name, command in commands.items():
                figures[name].append(measure(command))
                check_written(name, output)
                shutil.rmtree(output, ignore_errors=True)
    print("| program | wall, median (all) | resident peak | anonymous peak |\n|---|---|---|---|")
    for name, runs in figures.items():
        walls = [wall for wall, _, _ in runs]
        print(
            f"| {name} | {statistics.median(walls):.1f} s ({', '.join(f'{wall:.1f}' for wall in walls)}) | "
            f"{max(resident for _, resident, _ in runs) / 1e9:.2f} GB | "
            f"{max(anonymous for _, _, anonymous in runs) / 1e6:.0f} MB |"
        )


def check_written(name: str, output: Path) -> None:
    """Exit if a program has written no weights."""
    if not list(output.glob("*.safetensors")):
        sys.exit(f"{name}: no weights in {output}")
