"""Merges of adapters that were trained on quantised weights, for families with other modules than Qwen2's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_merge_families import adapter_of
from tiny_models import CONFIGS, make_tiny_model
from typer.testing import Result

from loratune.delivery.merge import job as merge_job
from loratune.delivery.verification import verify
from loratune.errors import Exit, LoratuneError
from loratune.model.architecture.roles import quantised_matrices
from loratune.model.base import load_base
from loratune.model.config import empty_model, load_config
from loratune.model.hardware import detect_hardware
from loratune.recipe.sections import ModelSettings
from loratune.runs.verification import Parity

Cli = Callable[..., Result]
USUAL = ("qwen3_moe",)
FAMILIES = [kind if kind in USUAL else pytest.param(kind, marks=pytest.mark.slow) for kind in CONFIGS]
MERGED = [kind if kind in USUAL else pytest.param(kind, marks=pytest.mark.slow) for kind in CONFIGS if kind != "gpt2"]


def settings_of(base: Path, quantization: str) -> ModelSettings:
    return ModelSettings(base=str(base), quantization=quantization, dtype="bfloat16")


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_quantised_matrices_are_those_that_are_quantised(kind: str, tmp_path: Path) -> None:
    base = make_tiny_model(kind, tmp_path / "base", torch.bfloat16)
    live = load_base(settings_of(base, "nf4"), base, detect_hardware())
    found = {f"{name}.weight" for name, module in live.named_modules() if type(module).__name__ == "Linear4bit"}
    assert found == quantised_matrices(empty_model(load_config(base)))


def merge_quantised(cli: Cli, patch: pytest.MonkeyPatch, kind: str, quantization: str, folder: Path) -> Any:
    base = make_tiny_model(kind, folder / "base", torch.bfloat16)
    adapter_of(base, folder / "adapter")
    patch.setattr(merge_job, "base_settings", lambda *_: settings_of(base, quantization))
    return cli("merge", "--adapter", folder / "adapter", "--base-model", base, "--output", folder / "merged")


@pytest.mark.parametrize("kind", MERGED)
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_both_bases_of_a_quantised_run_are_exact_with_their_rounding(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, quantization: str
) -> None:
    result = merge_quantised(cli, monkeypatch, kind, quantization, tmp_path)
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "merged" / "verification.json").read_text())
    if quantization == "nf4":  # int8 rounds what goes into a layer too, which no merged model does
        assert report["merge_base"] == "dequantized"
    for name in ("original", "dequantized"):
        exact, found = (report[key][name]["largest_difference"] for key in ("logits_with_rounding", "logits"))
        assert exact < 1e-3
        assert exact < found


def test_transposed_matrices_with_4_bits_are_refused_by_name(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = merge_quantised(cli, monkeypatch, "gpt2", "nf4", tmp_path)
    assert result.exit_code == Exit.USAGE, result.stderr
    assert "GPT2LMHeadModel has no layer that bitsandbytes can quantise" in " ".join(result.stderr.split())
    assert "reading back" not in result.stderr
    assert not (tmp_path / "merged").exists()


def test_a_merge_into_an_original_base_that_is_too_far_says_which_to_take(tmp_path: Path) -> None:
    far = Parity(
        tokens=9, largest_difference=8, mean_kl=1.1, top1_agreement=0.2, clear_disagreement=0.8, largest_logit=7
    )
    job: Any = SimpleNamespace(settings=settings_of(tmp_path, "nf4"))
    chosen: Any = SimpleNamespace(candidate=SimpleNamespace(merge_base="original"), parity=far)
    with pytest.raises(LoratuneError, match="--merge-base auto") as raised:
        verify._require_right(job, chosen)
    assert "please report" not in raised.value.message
