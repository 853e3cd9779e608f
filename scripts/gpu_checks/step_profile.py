"""Profiles one step of a 7B on 16 documents of 256 tokens, with loratune and with TRL."""

from __future__ import annotations

from gpu_checks.commands import clocked, clocked_sft
from gpu_checks.models import random_model, write_rows
from gpu_checks.table import Figures, Workplace
from gpu_checks.training_speed import COMMON, layers_of, trl_words

DOCUMENTS, LENGTH = 16, 256
STEPS, PROFILED = 6, 5


def step_profile(place: Workplace) -> Figures:
    """Return launches, waits and the GPU's busy share of the fifth step, and the same of TRL."""
    folder = place.folder / "profile"
    folder.mkdir(exist_ok=True)
    base, _ = random_model(place, layers_of(place))
    rows = write_rows(folder / "rows.json", [LENGTH] * DOCUMENTS * STEPS)
    settings = COMMON | {
        "model.base": base, "data.train": rows, "training.batch_size": DOCUMENTS, "training.max_steps": STEPS,
        "training.tokens_per_pass": DOCUMENTS * (LENGTH + 8), "training.gradient_checkpointing": False,
    }  # fmt: skip
    own = clocked_sft(folder, settings, profile=PROFILED).profile
    trl = clocked(folder, trl_words(base, rows, folder / "trl", DOCUMENTS, STEPS), profile=PROFILED).profile
    return own | {f"TRL: {name}": value for name, value in trl.items()}
