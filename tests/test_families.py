"""Every family from its files on the hub to an answer of the merged model, against transformers and PEFT."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROWS
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import CONFIGS, make_tiny_model
from transformers import AutoConfig, AutoTokenizer
from typer.testing import Result

from loratune.model.architecture.families import FAMILIES
from loratune.model.config import auto_class
from loratune.printable import visible
from loratune.training.trainer import AdapterTrainer

Cli = Callable[..., Result]
QUICK = ("qwen2", "qwen3_5", "qwen3_5_moe", "gpt_oss")
"""Those of the default run: dense, recurrent layers in a nested model, with experts, and attention with other terms."""
KINDS = [pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow) for kind in CONFIGS]
QUESTION = "How much is 3+3?"


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have infer compute in float32 on every CPU, so that two equal models give the same tokens."""
    for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, check, lambda: False)


def test_every_family_has_a_tiny_model() -> None:
    assert {*FAMILIES} == {*CONFIGS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_is_trained_resumed_merged_and_asked(
    cli: Cli, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_tiny_model(kind, tmp_path / "base")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    flags = [
        "sft", "--model.base", base, "--data.train", tmp_path / "rows.json", "--model.dtype", "float32",
        "--training.max_steps", "3", "--training.learning_rate", "1e-2", "--training.batch_size", "4",
        "--lora.dropout", "0",
    ]  # fmt: skip
    padded = cli(*flags, "--no-training.packing", "--output", tmp_path / "padded")
    assert padded.exit_code == 0, padded.stderr
    whole = cli(*flags, "--output", tmp_path / "whole")
    assert whole.exit_code == 0, whole.stderr
    stop_in_the_second_step(cli, monkeypatch, [*flags, "--output", tmp_path / "run"])
    resumed = cli(*flags, "--output", tmp_path / "run", "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    adapters = [load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("whole", "run", "padded")]
    assert adapters[0].keys() == adapters[1].keys() == adapters[2].keys()
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert losses(tmp_path / "padded") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)

    merged = cli("merge", "--adapter", tmp_path / "run", "--output", tmp_path / "merged")
    assert merged.exit_code == 0, merged.stderr
    assert layout(tmp_path / "merged") == layout(base)
    model = loaded(tmp_path / "merged")
    ids = torch.arange(20, 60)[None]
    by_peft = PeftModel.from_pretrained(loaded(base), tmp_path / "run" / "adapter")
    with torch.no_grad():
        expected, found, plain = (one(input_ids=ids).logits for one in (by_peft, model, loaded(base)))
    scale = expected.abs().max()
    assert (found - expected).abs().max() <= 1e-4 * scale
    assert (plain - expected).abs().max() > 1e-3 * scale

    question = ["--prompt", QUESTION, "--temperature", "0", "--max-new-tokens", "8"]
    for place in (["--adapter", tmp_path / "run"], ["--model", tmp_path / "merged"]):
        answer = cli("infer", *place, *question)
        assert answer.exit_code == 0, answer.stderr
        assert answer.stdout.strip() == visible(by_transformers(model, tmp_path / "merged"))


def stop_in_the_second_step(cli: Cli, monkeypatch: pytest.MonkeyPatch, flags: list[Any]) -> None:
    plain = AdapterTrainer.training_step

    def stopped(self: Any, *arguments: Any, **settings: Any) -> Any:
        if self.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "training_step", stopped)
        assert cli(*flags).exit_code == 128 + signal.SIGTERM


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def layout(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Name, shape and dtype of every tensor, and the bytes of those that an adapter cannot reach."""
    outside = ("visual", "vision", "mtp.", "multi_modal")
    return {
        name: (values.shape, values.dtype, values.numpy().tobytes() if any(part in name for part in outside) else b"")
        for name, values in load_file(folder / "model.safetensors").items()
    }


def loaded(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder)
    return auto_class(type(config)).from_pretrained(folder, dtype=torch.float32).eval()


def by_transformers(model: Any, folder: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    made = model.generate(**ids, max_new_tokens=8, do_sample=False, eos_token_id=3002, pad_token_id=3000)
    text: str = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()
