"""Compares the peak memory that `loratune plan` predicts with that of `loratune sft`, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.processes import measure
from benchmarks.synthetic import QWEN_7B, write_model

HELD = ("bfloat16", "float32", "nf4", "int8")
SHAPES: dict[str, dict[str, Any]] = {
    "wide": {"num_hidden_layers": 3, "hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16},
    "deep": {"num_hidden_layers": 24, "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8},
}
"""Of synthetic models of random weights, with Qwen2's layers."""
ROWS = 16
"""Of a step."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's flags."""
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="model folders")
    parser.add_argument("--shapes", choices=SHAPES, nargs="*", default=[], help="synthetic models")
    parser.add_argument("--held", choices=HELD, nargs="*", default=["bfloat16"])
    parser.add_argument("--lengths", type=int, nargs="*", default=[256], help="tokens of a row; with --rows, at most")
    parser.add_argument("--passes", type=int, nargs="*", default=[1024], help="tokens of a pass")
    parser.add_argument("--checkpointing", choices=["no", "yes"], nargs="*", default=["no", "yes"])
    parser.add_argument("--rows", type=Path, help="file of rows of many lengths, in place of rows of equal length")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--more", nargs="*", default=[], help="further settings, such as method=full")
    parser.add_argument("--json", type=Path, help="file that a line is added to for each setting")
    parser.add_argument("--plan-only", action="store_true", help="write predictions down before there is a run")


def run(arguments: argparse.Namespace) -> None:
    """Plan and train each combination, and print a line for it."""
    print("| base | held in | tokens of a row | of a pass | recomputed | predicted | peak | error |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="loratune-benchmark-") as place:
        folders = [*arguments.models, *(synthetic(name, Path(place)) for name in arguments.shapes)]
        grid = product(folders, arguments.held, arguments.lengths, arguments.passes, arguments.checkpointing)
        for setting in grid:
            told = compared(Path(place), *setting, arguments)
            print_line(told)
            if arguments.json:
                with arguments.json.open("a") as file:
                    file.write(json.dumps(told) + "\n")


def synthetic(name: str, place: Path) -> Path:
    """Write a model of random weights; return its folder."""
    config = QWEN_7B | {"vocab_size": 32_000, "num_key_value_heads": 4} | SHAPES[name]
    config |= {"bos_token_id": None, "eos_token_id": 3002, "pad_token_id": 3000}
    write_model(place / name, config)
    return (place / name / "base").rename(place / f"synthetic {name}")


def compared(
    place: Path, folder: Path, held: str, length: int, tokens: int, recomputed: str, asked: argparse.Namespace
) -> dict[str, Any]:
    """Return prediction and peak of one setting."""
    rows = asked.rows or place / "rows.json"
    if not asked.rows:
        rows.write_text(json.dumps(rows_of(folder, length, asked.steps * ROWS)))
    dtype, quantization = (held, "none") if "float" in held else ("bfloat16", held)
    flags = {
        "model.base": folder, "model.dtype": dtype, "model.quantization": quantization, "data.train": rows,
        "data.validation": 0, "training.max_steps": asked.steps, "training.batch_size": ROWS,
        "training.max_length": length if asked.rows else 4096, "training.tokens_per_pass": tokens,
        "evaluation.questions_share": 0, "output": place / "run",
    }  # fmt: skip
    flags |= dict(one.split("=", 1) for one in asked.more)
    line = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    line.append(f"--{'' if recomputed == 'yes' else 'no-'}training.gradient_checkpointing")
    planned = subprocess.run(
        [sys.executable, "-m", "loratune", "plan", *line, "--json"], capture_output=True, text=True, check=False
    )
    told = {
        "base": folder.name, "held": held, "length": length, "pass": tokens, "recomputed": recomputed,
        "rows": asked.rows and asked.rows.name, "steps": asked.steps, "more": asked.more,
        "plan": json.loads(planned.stdout) if planned.stdout else planned.stderr[-2000:],
    }  # fmt: skip
    if asked.plan_only or isinstance(told["plan"], str):
        return told
    measure([sys.executable, "-m", "loratune", "sft", "--overwrite", *line])
    report = json.loads((place / "run" / "report.json").read_text())
    return told | {"peak_bytes": report["peak_memory_bytes"]}


def rows_of(folder: Path, length: int, count: int) -> list[dict[str, str]]:
    """Return rows of about as many tokens, no two alike."""
    from loratune.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    ids = tokenizer("The river has many names. " * length)["input_ids"][: max(8, length - 40)]
    text = tokenizer.decode(ids)
    return [{"instruction": f"{number} of them", "output": f"{text} {number}"} for number in range(count)]


def print_line(told: dict[str, Any]) -> None:
    """Print a row of the table."""
    if isinstance(told["plan"], str):
        print(told["plan"], flush=True)
        return
    predicted, peak = told["plan"]["peak_bytes"], told.get("peak_bytes")
    error = f"{predicted / peak - 1:+.1%}" if peak else ""
    base = " ".join([told["base"], *told["more"]])
    shown = f"{peak / 1e9:.2f} GB" if peak else ""
    print(
        f"| {base} | {told['held']} | {told['length']} | {told['plan']['tokens_per_pass']} | {told['recomputed']} | "
        f"{predicted / 1e9:.2f} GB | {shown} | {error} |",
        flush=True,
    )
