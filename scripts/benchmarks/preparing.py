"""Compares `loratune data check` with the data preparation of TRL's SFTTrainer on the same rows."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.processes import measure

# Both print the seconds from reading the file to a trainable dataset, including the tokenizer, excluding imports.
TRL = """
import json, sys, time
from datasets import Dataset
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer

folder, path, place, max_length = sys.argv[1:]
model = Qwen2ForCausalLM(Qwen2Config(vocab_size=200_000, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                     num_attention_heads=1, num_key_value_heads=1))
settings = SFTConfig(output_dir=place, max_length=int(max_length), use_cpu=True, bf16=False, report_to="none",
                     disable_tqdm=True)

def conversation(row):
    question = row["instruction"] + ("\\n" + row["input"] if row.get("input") else "")
    return {"prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": row["output"]}]}

start = time.perf_counter()
tokenizer = AutoTokenizer.from_pretrained(folder)
rows = Dataset.from_list([conversation(row) for row in json.load(open(path, encoding="utf-8"))])
trainer = SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
seconds = time.perf_counter() - start
print("SECONDS", seconds, sum(map(len, trainer.train_dataset["input_ids"])))
"""
LORATUNE = """
import sys, time
import loratune.data.assembly.dataset, loratune.model.tokenizer
from loratune.recipe.loading import load_recipe
from loratune.training.gate import pass_gate

folder, path, place, max_length = sys.argv[1:]
flags = {"model.base": folder, "data.train": [path], "data.validation": "0", "training.max_length": max_length}
recipe = load_recipe(None, flags)
start = time.perf_counter()
rows = loratune.data.assembly.dataset.as_dataset(pass_gate(recipe).checked().train)
seconds = time.perf_counter() - start
print("SECONDS", seconds, sum(map(len, rows.with_format("numpy")["input_ids"])))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.add_argument("--model", type=Path, required=True, help="folder with a tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="Alpaca rows, repeated with a number in each")
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--large", type=int, default=500_000, help="number of rows for loratune alone; 0 skips it")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=1024)


def run(arguments: argparse.Namespace) -> None:
    """Prepare the same rows with both in alternation, check them again, then prepare many more."""
    with tempfile.TemporaryDirectory(prefix="loratune-benchmark-") as place:
        path = write_rows(arguments.data, arguments.rows, Path(place))
        figures: dict[str, list[tuple[float, float, float, float]]] = {"TRL": [], "loratune": []}
        for number in range(arguments.runs):
            os.environ["HF_HOME"] = os.environ["LORATUNE_CACHE"] = f"{place}/cache-{number}"
            for name, code in (("TRL", TRL), ("loratune", LORATUNE)):
                figures[name].append(prepare(code, arguments, path, place))
        table = [line(f"{name}, {arguments.rows:,} rows", runs) for name, runs in figures.items()]
        wall, resident, anonymous = measure(check_command(arguments, path))
        table.append(f"| `loratune data check`, second run | | {wall:.1f} s | {sizes(resident, anonymous)} |")
        if arguments.large:
            path.unlink()
            path = write_rows(arguments.data, arguments.large, Path(place))
            table.append(line(f"loratune, {arguments.large:,} rows", [prepare(LORATUNE, arguments, path, place)]))
            wall, resident, anonymous = measure(check_command(arguments, path))
            table.append(f"| `loratune data check`, second run | | {wall:.1f} s | {sizes(resident, anonymous)} |")
    ratio = statistics.median(trl[0] / ours[0] for trl, ours in zip(figures["TRL"], figures["loratune"], strict=True))
    print("| | rows → data set | whole process | resident, anonymous peak |\n|---|---|---|---|")
    print("\n".join(table))
    print(f"\nTRL / loratune: {ratio:.1f}")


def write_rows(source: Path, count: int, place: Path) -> Path:
    """Write a file of `count` distinct rows."""
    rows = json.loads(source.read_text(encoding="utf-8"))
    path = place / f"rows-{count}.json"
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = rows[number % len(rows)]
            changed = row | {"instruction": f"{number}. {row['instruction']}"}
            file.write(("[\n" if number == 0 else ",\n") + json.dumps(changed, ensure_ascii=False, indent=2))
        file.write("\n]\n")
    return path


def prepare(code: str, arguments: argparse.Namespace, path: Path, place: str) -> tuple[float, float, float, float]:
    """Return the seconds of the preparation and of the process, and the peaks of resident and anonymous memory."""
    settings = [str(arguments.model), str(path), place, str(arguments.max_length)]
    log = Path(place) / "output"
    wall, resident, anonymous = measure([sys.executable, "-c", code, *settings], log)
    seconds = next(text.split()[1] for text in log.read_text().splitlines() if text.startswith("SECONDS"))
    time.sleep(1)
    return float(seconds), wall, resident, anonymous


def check_command(arguments: argparse.Namespace, path: Path) -> list[str]:
    """Return the command that checks already prepared rows."""
    flags = ["--model.base", str(arguments.model), "--data.train", str(path), "--data.validation", "0"]
    flags += ["--training.max_length", str(arguments.max_length)]
    return [sys.executable, "-m", "loratune", "data", "check", *flags]


def line(name: str, runs: list[tuple[float, float, float, float]]) -> str:
    seconds, walls = [one[0] for one in runs], [one[1] for one in runs]
    every = f" ({', '.join(f'{one:.1f}' for one in seconds)})" if len(runs) > 1 else ""
    memory = sizes(max(one[2] for one in runs), max(one[3] for one in runs))
    return f"| {name} | {statistics.median(seconds):.1f} s{every} | {statistics.median(walls):.1f} s | {memory} |"


def sizes(resident: float, anonymous: float) -> str:
    """Format both peaks."""
    return f"{resident / 1e9:.2f} GB, {anonymous / 1e9:.2f} GB"
