"""Merges an adapter and a quantised run, with the proof on GPU and CPU, and exports the result in 4 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpu_checks.commands import LORATUNE, Finished, loratune, run, sft_words
from gpu_checks.models import random_model
from gpu_checks.table import Figures, Workplace

LAYERS = 4


def merge(place: Workplace) -> Figures:
    """Return exit codes, seconds, and the divergence of each merged model from base + adapter."""
    folder = place.folder / "merge"
    folder.mkdir(exist_ok=True)
    base, adapter = random_model(place, LAYERS)
    trained, large, small = folder / "run", folder / "merged", folder / "merged-nf4"
    settings = {
        "output": trained, "model.quantization": "nf4", "training.max_steps": 8, "evaluation.questions_share": 0,
    }  # fmt: skip
    given = ["--adapter", adapter, "--base-model", base]
    ended = {
        "merge": loratune("merge", *given, "--output", large, "--overwrite"),
        "sft nf4": loratune(*sft_words(settings, "--config", "quickstart", "--overwrite")),
        "merge nf4": loratune("merge", "--adapter", trained, "--output", small, "--overwrite"),
        "export bnb4": loratune(
            "export", "--model", small, "--format", "bnb4", "--output", folder / "4", "--overwrite"
        ),
    }
    verify = ["verify", large, *given, "--json"]
    ended |= {"verify": loratune(*verify), "verify on the CPU": run([*LORATUNE, *verify], CUDA_VISIBLE_DEVICES="-1")}
    proofs = [proof_of(ended[name]) for name in ("verify", "verify on the CPU")]
    return {
        "exit codes": {name: done.exit_code for name, done in ended.items()},
        "wrong exit codes": sum(done.exit_code != 0 for done in ended.values()),
        "said": {name: done.last_words for name, done in ended.items() if done.exit_code},
        "seconds": {name: round(done.seconds, 1) for name, done in ended.items()},
        "longest merge, seconds": max(ended[name].seconds for name in ("merge", "merge nf4")),
        "proofs ran on": [proof.get("computed_on") for proof in proofs],
        "difference of the proofs' KL": abs(mean_kl(proofs[0]) - mean_kl(proofs[1])),
        "proof on the GPU / on the CPU, time": ended["verify"].seconds / ended["verify on the CPU"].seconds,
        "mean KL": divergence(large, ended["merge"]),
        "mean KL, nf4": divergence(small, ended["merge nf4"]),
    }


def proof_of(done: Finished) -> dict[str, Any]:
    """Return what `verify --json` says of running the models."""
    if done.exit_code:
        return {}
    models: dict[str, Any] = json.loads(done.stdout)["proved"]
    return models


def mean_kl(proof: dict[str, Any]) -> float:
    """Return the mean KL divergence from base + adapter with the rounding of the merged weights; NaN without one."""
    found = proof.get("logits_with_rounding") or {}
    return float(max((parity["mean_kl"] for parity in found.values()), default=float("nan")))


def divergence(merged: Path, done: Finished) -> dict[str, Any]:
    """Return the mean KL divergence from base + adapter with the rounding of the merged weights, in nats."""
    if done.exit_code:
        return {}
    found = json.loads((merged / "verification.json").read_text()).get("logits_with_rounding") or {}
    return {name: parity["mean_kl"] for name, parity in found.items()}
