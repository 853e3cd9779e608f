"""Trains tiny-qwen for a few steps with every setting that has code of its own, and compares the losses."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_checks.commands import Finished, loratune, sft_words
from gpu_checks.table import Figures, Workplace
from loratune.runs.folder import read_metrics

STEPS = 3
AT_ONCE = 4
COMMON = {
    "model.dtype": "bfloat16", "training.max_steps": STEPS, "training.warmup": 0, "training.batch_size": 8,
    "lora.dropout": 0, "data.validation": 0, "evaluation.questions_share": 0,
}  # fmt: skip
MODES: dict[str, dict[str, object]] = {
    "none": {},
    "nf4": {"model.quantization": "nf4"},
    "int8": {"model.quantization": "int8"},
    "checkpointing": {"training.gradient_checkpointing": True},
    "nf4, checkpointing": {"model.quantization": "nf4", "training.gradient_checkpointing": True},
    "int8, checkpointing": {"model.quantization": "int8", "training.gradient_checkpointing": True},
    "float32": {"model.dtype": "float32"},
    "float16": {"model.dtype": "float16"},
    "nf4, float16": {"model.quantization": "nf4", "model.dtype": "float16"},
    "adamw_8bit": {"training.optimizer": "adamw_8bit"},
    "paged_adamw_8bit": {"training.optimizer": "paged_adamw_8bit"},
    "paged_adamw_32bit": {"training.optimizer": "paged_adamw_32bit"},
    "DoRA": {"lora.use_dora": True},
    "rsLoRA": {"lora.use_rslora": True},
    "NEFTune": {"training.neftune_alpha": 5},
    "modules_to_save": {"lora.modules_to_save": "embed_tokens"},
    "bias": {"lora.bias": "all"},
    "no packing": {"training.packing": False},
    "sdpa": {"model.attn_implementation": "sdpa"},
    "eager": {"model.attn_implementation": "eager"},
}
ON_CPU = ("none", "nf4", "checkpointing", "float32", "DoRA", "modules_to_save", "bias", "no packing", "eager")
"""The settings that are tried without a GPU."""
OF_NF4 = "nf4"
OF_INT8 = "int8"


def matrix(place: Workplace) -> Figures:
    """Return exit code, losses and seconds of each setting, and how many failed."""
    folder = place.folder / "matrix"
    folder.mkdir(exist_ok=True)
    names = list(MODES) if place.is_gpu else list(ON_CPU)
    with ThreadPoolExecutor(AT_ONCE if place.is_gpu else 1) as pool:
        ended = dict(zip(names, pool.map(lambda name: train(folder, name), names), strict=True))
    rows = {name: row_of(run_of(folder, name), done) for name, done in ended.items()}
    deviations = {name: deviation(rows, name) for name in names}
    failed = [name for name in names if rows[name]["exit code"] or len(rows[name]["losses"]) != STEPS]
    known = {name: value for name, value in deviations.items() if value is not None}
    furthest = max(known, key=lambda name: known[name], default="none")
    return {
        "failed settings": len(failed),
        "failed": failed,
        "largest deviation of a loss": known.get(furthest),
        "furthest": furthest,
        "deviations": deviations,
        "settings": rows,
    }


def train(folder: Path, name: str) -> Finished:
    settings = COMMON | MODES[name] | {"output": run_of(folder, name)}
    return loratune(*sft_words(settings, "--config", "quickstart", "--overwrite"))


def run_of(folder: Path, name: str) -> Path:
    return folder / name.replace(", ", "-").replace(" ", "-")


def row_of(run: Path, done: Finished) -> dict[str, Any]:
    losses = [record["loss"] for record in read_metrics(run) if "loss" in record] if done.exit_code == 0 else []
    said = {} if done.exit_code == 0 else {"said": done.last_words}
    return {"exit code": done.exit_code, "losses": losses, "seconds": round(done.seconds, 1)} | said


def deviation(rows: Mapping[str, dict[str, Any]], name: str) -> float | None:
    """Return how far a setting's first loss is from that of plain bfloat16 on the same base, relative to it.

    Before its first step every adapter is without effect, whatever it is made of. None for NEFTune, whose noise changes
    the loss, and for what has no loss.
    """
    base = OF_NF4 if name.startswith(OF_NF4) else OF_INT8 if name.startswith(OF_INT8) else "none"
    if name == "NEFTune" or not rows[name]["losses"] or not rows.get(base, {}).get("losses"):
        return None
    right = float(rows[base]["losses"][0])
    return abs(float(rows[name]["losses"][0]) - right) / right
