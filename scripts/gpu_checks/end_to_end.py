"""Trains tiny-qwen, interrupts and resumes the run, and takes the adapter through every later command."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

from gpu_checks.commands import LORATUNE, loratune, sft_words
from gpu_checks.table import Figures, Workplace

STEPS = 24
INTERRUPTED_AFTER = 5


def end_to_end(place: Workplace) -> Figures:
    """Return exit codes, losses and seconds, and how far the resumed adapter is from the uninterrupted one."""
    folder = place.folder / "end-to-end"
    folder.mkdir(exist_ok=True)
    whole, resumed, merged = folder / "whole", folder / "resumed", folder / "merged"
    codes: dict[str, int] = {}
    seconds: dict[str, float] = {}

    def step(name: str, *words: object) -> None:
        done = loratune(*words)
        codes[name], seconds[name] = done.exit_code, round(done.seconds, 1)

    step("sft", *words_of(whole), "--overwrite")
    codes["sft, SIGTERM"] = interrupted(resumed)
    step("sft --resume", *words_of(resumed), "--resume")
    step("runs show", "runs", "show", resumed)
    step("infer", "infer", "--adapter", resumed, "--prompt", "Who are you?", "--max-new-tokens", 16)
    step("merge", "merge", "--adapter", resumed, "--output", merged, "--overwrite")
    step(
        "export adapter", "export", "--adapter", resumed, "--format", "adapter", "--output", folder / "a", "--overwrite"
    )
    step("export bnb4", "export", "--model", merged, "--format", "bnb4", "--output", folder / "b", "--overwrite")
    expected = {name: 128 + signal.SIGTERM if "SIGTERM" in name else 0 for name in codes}
    report = json.loads((whole / "report.json").read_text())
    return {
        "exit codes": codes,
        "wrong exit codes": sum(codes[name] != expected[name] for name in codes),
        "seconds": seconds,
        "first loss": report["loss"]["first"],
        "last loss": report["loss"]["last"],
        "last loss / first": report["loss"]["last"] / report["loss"]["first"],
        "resumed adapter differs by": difference(whole, resumed),
    }


def words_of(run: Path) -> list[object]:
    settings = {
        "output": run, "data.validation": 0.1, "training.max_steps": STEPS, "evaluation.every_steps": 8,
        "checkpoints.every_steps": 8, "evaluation.questions_share": 0, "training.deterministic": True,
    }  # fmt: skip
    return sft_words(settings, "--config", "quickstart")


def interrupted(run: Path) -> int:
    """Start a run, send it SIGTERM after some steps, and return its exit code."""
    with (run.parent / "interrupted.log").open("wb") as log:
        process = subprocess.Popen([*LORATUNE, *map(str, words_of(run)), "--overwrite"], stdout=log, stderr=log)
        while process.poll() is None and steps_made(run) < INTERRUPTED_AFTER:
            time.sleep(0.05)
        process.terminate()
        return process.wait()


def steps_made(run: Path) -> int:
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return 0
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def difference(one: Path, other: Path) -> float:
    """Return the largest difference of two adapters' values, relative to the largest value of each tensor."""
    from safetensors.torch import load_file

    first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other))
    if first.keys() != second.keys():
        return float("inf")
    return max(float((first[name] - second[name]).abs().max() / first[name].abs().max()) for name in first)
