"""Trains a 7B of random weights with loratune and with TRL on the same rows: speed, memory, loss on unseen rows."""

from __future__ import annotations

import importlib.util
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.processes import printed_figures
from benchmarks.synthetic import QWEN_7B

from gpu_checks import machine
from gpu_checks.commands import Clocked, clocked, clocked_sft
from gpu_checks.models import SMALL, random_model, rows_of, write_rows
from gpu_checks.runner import REPOSITORY
from gpu_checks.table import Figures, Workplace

STEPS, WARM_UP = 12, 5
UNSEEN = 40
BENCHMARKS = REPOSITORY / "scripts" / "benchmarks"
COMMON: dict[str, object] = {
    "model.dtype": "bfloat16", "data.validation": 0, "data.severity": "repetitive=ignore",
    "lora.rank": 8, "lora.alpha": 16, "lora.dropout": 0.05,
    "training.max_steps": STEPS, "training.warmup": 0, "evaluation.questions_share": 0,
}  # fmt: skip
LONG_ROWS, LONG_BATCH = range(50, 1001, 9), 8
"""Lengths that are all different, and so many rows to a step that it has about 4,096 tokens."""


def training_speed(place: Workplace) -> Figures:
    """Return the speed of short rows with the shipped recipe, of long rows, and of long rows with checkpointing."""
    folder = place.folder / "speed"
    folder.mkdir(exist_ok=True)
    base, _ = random_model(place, layers_of(place))
    short = write_rows(folder / "short.json", [30 + 7 * n % 131 for n in range(16 * STEPS)])
    long = write_rows(folder / "long.json", list(LONG_ROWS))
    unseen = folder / "unseen.json"
    unseen.write_text(json.dumps(rows_of([30 + 11 * n % 131 for n in range(UNSEEN)])))
    figures: dict[str, Any] = {}
    own = clocked_sft(folder, shipped(base, short), "--config", "qwen7b", warm_up=WARM_UP)
    figures |= told("short rows", own, place)
    figures["short rows: unseen loss"] = unseen_loss(base, unseen, folder / "run" / "adapter")
    figures |= beside_others("short rows", own, folder, base, short, 16)
    figures["short rows: unseen loss of TRL"] = unseen_loss(base, unseen, folder / "trl")
    own = clocked_sft(folder, long_settings(base, long), warm_up=WARM_UP)
    figures |= told("long rows", own, place) | beside_others("long rows", own, folder, base, long, LONG_BATCH)
    large = {"training.batch_size": 16, "training.tokens_per_pass": 8192, "training.gradient_checkpointing": True}
    own = clocked_sft(folder, long_settings(base, long) | large, warm_up=WARM_UP)
    return figures | told("checkpointing", own, place)


def other_types(place: Workplace) -> Figures:
    """Return the speed of long rows in nf4 and float16, beside bfloat16 on the same rows."""
    folder = place.folder / "types"
    folder.mkdir(exist_ok=True)
    base, _ = random_model(place, layers_of(place))
    settings = long_settings(base, write_rows(folder / "long.json", list(LONG_ROWS)))
    kinds: dict[str, dict[str, object]] = {"bfloat16": {}, "nf4": {"model.quantization": "nf4"}}
    if place.is_gpu:
        kinds["float16"] = {"model.dtype": "float16"}
    runs = {name: clocked_sft(folder, settings | own, warm_up=WARM_UP) for name, own in kinds.items()}
    figures: dict[str, Any] = {}
    for name, run in runs.items():
        figures |= told(name, run, place)
    figures["nf4 / bfloat16 speed"] = runs["nf4"].tokens_per_second / runs["bfloat16"].tokens_per_second
    if "float16" in runs:
        right = statistics.mean(runs["bfloat16"].losses)
        figures["float16 loss deviation"] = abs(statistics.mean(runs["float16"].losses) - right) / right
    return figures


def layers_of(place: Workplace) -> int:
    """Return the layers of the model that stands for a 7B."""
    return 28 if place.is_gpu else 2


def shipped(base: Path, rows: Path) -> dict[str, object]:
    """Return what the recipe qwen7b needs to train another base on other rows for some steps, with TRL's rank."""
    settings = {name: value for name, value in COMMON.items() if name not in ("model.dtype", "lora.alpha")}
    return settings | {"model.base": base, "data.train": rows}


def long_settings(base: Path, rows: Path) -> dict[str, object]:
    """Return the settings of passes of up to 4,096 tokens without checkpointing; a longer step takes two of them."""
    return COMMON | {
        "model.base": base, "data.train": rows, "training.batch_size": LONG_BATCH,
        "training.tokens_per_pass": 4096, "training.gradient_checkpointing": False,
    }  # fmt: skip


def told(name: str, run: Clocked, place: Workplace) -> dict[str, Any]:
    """Return the figures of one training under its name."""
    times = run.token_seconds
    found = {
        "tokens/s": run.tokens_per_second, "p95 / p50": quantile(times, 0.95) / quantile(times, 0.5),
        "last loss": run.losses[-1], "allocated GB": run.allocated / 1e9, "reserved GB": run.reserved / 1e9,
    }  # fmt: skip
    if peak := machine.nominal_flops():
        found["MFU"] = run.tokens_per_second * flops_per_token(place) / peak
    return {f"{name}: {figure}": value for figure, value in found.items()}


def flops_per_token(place: Workplace) -> float:
    """Return the operations of a training step for one token: a frozen weight takes part in two products of two each.

    Attention and the head, which is computed at labelled positions alone, are left out.
    """
    config = QWEN_7B if place.is_gpu else SMALL
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    key_value = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    return 4.0 * layers_of(place) * (2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * inner)


def quantile(ascending: list[float], share: float) -> float:
    return ascending[min(len(ascending) - 1, round(share * (len(ascending) - 1)))]


def beside_others(name: str, own: Clocked, folder: Path, base: Path, rows: Path, batch: int) -> dict[str, Any]:
    """Return the same of TRL with its own defaults, of TRL without checkpointing where that fits, and of unsloth."""
    programs = {
        "TRL": trl_words(base, rows, folder / "trl", batch, STEPS, "gradient_checkpointing=true"),
        "TRL without checkpointing": trl_words(base, rows, folder / "trl-fast", batch, STEPS),
    }
    if importlib.util.find_spec("unsloth"):
        programs["unsloth"] = [BENCHMARKS / "plain_unsloth.py", base, rows, folder / "unsloth", batch, STEPS, 2048]
    figures: dict[str, Any] = {}
    for program, words in programs.items():
        try:
            run = clocked(folder, words, WARM_UP)
        except RuntimeError as error:
            if program == "TRL":
                raise
            figures[f"{name}: {program}"] = str(error)
            continue
        figures[f"{name}: tokens/s of {program}"] = run.tokens_per_second
        figures[f"{name}: GB of {program}"] = run.allocated / 1e9
        figures[f"{name}: last loss of {program}"] = run.losses[-1]
        figures[f"{name}: ratio to {program}"] = own.tokens_per_second / run.tokens_per_second
    return figures


def trl_words(base: Path, rows: Path, output: Path, batch: int, steps: int, *others: str) -> list[object]:
    """Return the words of a training with TRL: padded rows, bfloat16 autocast, dropout as loratune's."""
    settings = (f"max_steps={steps}", "bf16=true", "lora_dropout=0.05", *others)
    return [BENCHMARKS / "plain_trl.py", base, rows, output, batch, 1000, 2048, "none", *settings]


def unseen_loss(base: Path, rows: Path, adapter: Path) -> float:
    """Return nats per answer token, computed without loratune."""
    return float(printed_figures(BENCHMARKS / "unseen_loss.py", base, adapter, rows)["nll"][0])
