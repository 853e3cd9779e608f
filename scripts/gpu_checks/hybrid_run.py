"""Takes a tiny hybrid with experts, in the layout of the hub, through training, inference and merge."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny_models import make_tiny_model

from gpu_checks.commands import Finished, loratune, sft_words
from gpu_checks.table import Figures, Workplace

KIND = "qwen3_5_moe"
COMMON: dict[str, object] = {
    "model.dtype": "bfloat16", "lora.rank": 8, "lora.alpha": 16, "lora.dropout": 0, "data.validation": 0,
    "training.max_steps": 60, "training.learning_rate": 5e-3, "training.warmup": 0, "evaluation.questions_share": 0,
}  # fmt: skip
RUNS: dict[str, dict[str, object]] = {
    "all-linear": {},
    "experts": {"lora.target_modules": "attention,experts", "training.gradient_checkpointing": True},
    "nf4": {"model.quantization": "nf4"},
}


def hybrid_run(place: Workplace) -> Figures:
    """Return exit codes, losses, and how far each merged model is from base + adapter."""
    folder = place.folder / "hybrid"
    base = folder / "base"
    if not (base / "config.json").is_file():
        make_tiny_model(KIND, base, torch.bfloat16)
    ended: dict[str, Finished] = {}
    ratios: dict[str, float] = {}
    for name, settings in RUNS.items():
        run, merged = folder / name, folder / f"{name}-merged"
        words = sft_words(COMMON | settings | {"model.base": base, "output": run}, "--config", "quickstart")
        ended[f"{name}: sft"] = loratune(*words, "--overwrite")
        ended[f"{name}: infer"] = loratune(
            "infer", "--adapter", run, "--prompt", "Who are you?", "--max-new-tokens", 16
        )
        ended[f"{name}: merge"] = loratune("merge", "--adapter", run, "--output", merged, "--overwrite")
        ended[f"{name}: infer merged"] = loratune(
            "infer", "--model", merged, "--prompt", "Who are you?", "--max-new-tokens", 16
        )
        ratios[name] = loss_ratio(run)
    return {
        "exit codes": {name: done.exit_code for name, done in ended.items()},
        "wrong exit codes": sum(done.exit_code != 0 for done in ended.values()),
        "said": {name: done.last_words for name, done in ended.items() if done.exit_code},
        "seconds": {name: round(done.seconds, 1) for name, done in ended.items()},
        "last loss / first": ratios,
        "highest last loss / first": max(ratios.values()),
        "highest mean KL of a proof": max(divergence(folder / f"{name}-merged") for name in RUNS),
    }


def loss_ratio(run: Path) -> float:
    """Return the last loss over the first; infinity for a run that did not end."""
    try:
        loss = json.loads((run / "report.json").read_text())["loss"]
    except OSError:
        return float("inf")
    return float(loss["last"] / loss["first"])


def divergence(merged: Path) -> float:
    """Return the highest mean KL divergence from base + adapter with the rounding of the merged weights, in nats."""
    try:
        found = json.loads((merged / "verification.json").read_text())["logits_with_rounding"]
    except (OSError, KeyError):
        return float("inf")
    return max(float(parity["mean_kl"]) for parity in found.values())
