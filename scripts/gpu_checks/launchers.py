"""Trains tiny-qwen in the ways that launchers start a program, and compares the losses with a plain run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from gpu_checks.commands import LORATUNE, Finished, run, sft_words
from gpu_checks.table import Figures, Workplace
from loratune.runs.folder import read_metrics

TWO_GPUS = """
import torch
torch.cuda.device_count = lambda: 2
from loratune.cli.app import main
main()
"""
"""A machine with a second GPU, as far as the count goes."""
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1)
ALONE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "WORLD_SIZE": "1", "RANK": "0"}


def launchers(place: Workplace) -> Figures:
    """Return exit codes, and the largest difference of a loss from the plain run's."""
    folder = place.folder / "launchers"
    folder.mkdir(exist_ok=True)
    ended: dict[str, Finished] = {
        "plain": run([*LORATUNE, *words_of(folder / "plain")]),
        "torchrun": run([*TORCHRUN, "-m", "loratune", *words_of(folder / "torchrun")]),
    }
    if place.is_gpu:
        ended["two GPUs"] = run([sys.executable, "-c", TWO_GPUS, *words_of(folder / "two GPUs")])
        own = run([*LORATUNE, *words_of(folder / "LOCAL_RANK 3")], **ALONE, LOCAL_RANK="3", CUDA_VISIBLE_DEVICES="0")
        ended["LOCAL_RANK 3"] = own
    losses = {name: losses_of(folder / name) for name, done in ended.items() if done.exit_code == 0}
    pairs = [
        abs(loss - right)
        for found in losses.values()
        for loss, right in zip(found, losses.get("plain", []), strict=False)
    ]
    figures: dict[str, Any] = {
        "exit codes": {name: done.exit_code for name, done in ended.items()},
        "wrong exit codes": sum(done.exit_code != 0 for done in ended.values()),
        "said": {name: done.last_words for name, done in ended.items() if done.exit_code},
        "losses": losses,
    }
    return figures | {"largest difference of a loss": max(pairs, default=None)}


def words_of(folder: Path) -> list[object]:
    settings = {
        "output": folder, "model.dtype": "float32", "training.max_steps": 6, "evaluation.questions_share": 0,
        "lora.dropout": 0,
    }  # fmt: skip
    return sft_words(settings, "--config", "quickstart", "--overwrite")


def losses_of(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder) if "loss" in record]
