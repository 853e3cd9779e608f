"""Trains a hybrid and a mixture of random weights with loratune and with TRL on the same rows: speed and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import make_tiny_model

from gpu_checks.commands import clocked, clocked_sft
from gpu_checks.models import write_rows
from gpu_checks.nf4_mixture import A3B
from gpu_checks.table import Figures, Workplace
from gpu_checks.training_speed import LONG_BATCH, LONG_ROWS, STEPS, WARM_UP, long_settings, trl_words

QUARTER = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "hybrid": (
        "qwen3_5_text",
        {
            "hidden_size": 2560, "intermediate_size": 9216, "num_attention_heads": 16, "num_key_value_heads": 4,
            "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
            "linear_value_head_dim": 128, "num_hidden_layers": 8, "layer_types": QUARTER * 2, "vocab_size": 248_320,
        },
    ),
    "mixture": ("qwen3_moe", A3B | {"num_hidden_layers": 4, "vocab_size": 151_936}),
}  # fmt: skip
"""Eight layers of Qwen3.5-4B, and four of Qwen3-30B-A3B."""
TARGETS: dict[str, tuple[str, str]] = {
    "hybrid": ("all-linear", '"all-linear"'), "mixture": ("attention", '["q_proj", "k_proj", "v_proj", "o_proj"]'),
}  # fmt: skip
"""As loratune and PEFT name them. On a mixture PEFT would take all-linear for the experts, and refuse its dropout."""


def family_speed(place: Workplace) -> Figures:
    """Return tokens per second and peak memory of both programs; without a GPU, of tiny models and one step."""
    figures: dict[str, Any] = {}
    for name, (kind, sizes) in SHAPES.items():
        folder = place.folder / "family-speed" / name
        base = written(folder / "base", kind, sizes if place.is_gpu else {})
        rows = write_rows(folder / "rows.json", list(LONG_ROWS))
        steps = STEPS if place.is_gpu else WARM_UP + 1
        targets, named = TARGETS[name]
        settings = long_settings(base, rows) | {"training.max_steps": steps, "lora.target_modules": targets}
        own = clocked_sft(folder, settings, warm_up=WARM_UP)
        others = ("gradient_checkpointing=true", f"target_modules={named}")
        trl = clocked(folder, trl_words(base, rows, folder / "trl", LONG_BATCH, steps, *others), WARM_UP)
        for program, run in (("loratune", own), ("TRL", trl)):
            figures[f"{name}: tokens/s of {program}"] = run.tokens_per_second
            figures[f"{name}: GB of {program}"] = run.allocated / 1e9
            figures[f"{name}: last loss of {program}"] = run.losses[-1]
        figures[f"{name}: ratio to TRL"] = own.tokens_per_second / trl.tokens_per_second
        figures[f"{name}: memory / TRL"] = own.allocated / trl.allocated
    return figures


def written(folder: Path, kind: str, sizes: dict[str, Any]) -> Path:
    return folder if (folder / "config.json").is_file() else make_tiny_model(kind, folder, torch.bfloat16, **sizes)
