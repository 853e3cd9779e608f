"""Merges of adapters that were trained on quantised weights, for families with other modules than Qwen2's."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from misreading import misread_updates
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_merge_families import adapter_of, stacks_adapter_of
from tiny_models import CONFIGS, make_tiny_model
from typer.testing import Result

from loratune.delivery.merge import job as merge_job
from loratune.delivery.merge import merge
from loratune.delivery.merge.merged_weights import write_merged
from loratune.delivery.merge.update import TensorUpdate
from loratune.delivery.verification import verify
from loratune.errors import Exit, LoratuneError
from loratune.model.architecture.roles import quantised_matrices
from loratune.model.base import load_base
from loratune.model.config import empty_model, load_config
from loratune.model.from_folder import load_plain
from loratune.model.hardware import detect_hardware
from loratune.recipe.sections import ModelSettings
from loratune.runs.verification import Parity

Cli = Callable[..., Result]
USUAL = ("qwen3_moe",)
FAMILIES = [
    kind if kind in USUAL else pytest.param(kind, marks=pytest.mark.slow)
    for kind in CONFIGS
    if kind != "gpt2"  # has nothing that bitsandbytes quantises
]


def settings_of(base: Path, quantization: str) -> ModelSettings:
    return ModelSettings(base=str(base), quantization=quantization, dtype="bfloat16")


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_quantised_matrices_are_those_that_are_quantised(kind: str, tmp_path: Path) -> None:
    base = make_tiny_model(kind, tmp_path / "base", torch.bfloat16)
    live = load_base(settings_of(base, "nf4"), base, detect_hardware())
    found = {f"{name}.weight" for name, module in live.named_modules() if type(module).__name__ == "Linear4bit"}
    assert found == quantised_matrices(empty_model(load_config(base)))


def merge_quantised(
    cli: Cli,
    patch: pytest.MonkeyPatch,
    kind: str,
    quantization: str,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    write_adapter: Callable[[Path, Path], Any] = adapter_of,
) -> Any:
    """Merge an adapter as if it had been trained in bfloat16 on a quantised base, whose files have a dtype."""
    base = make_tiny_model(kind, folder / "base", dtype)
    write_adapter(base, folder / "adapter")
    patch.setattr(merge_job, "base_settings", lambda *_: settings_of(base, quantization))
    return cli("merge", "--adapter", folder / "adapter", "--base-model", base, "--output", folder / "merged")


def largest_differences(folder: Path) -> dict[str, tuple[float, float]]:
    """Of each merged model's logits: from base + adapter that is rounded alike, and from base + adapter."""
    report = json.loads((folder / "merged" / "verification.json").read_text())
    exact, found = report["logits_with_rounding"], report["logits"]
    return {name: (exact[name]["largest_difference"], found[name]["largest_difference"]) for name in found}


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_both_bases_of_a_quantised_run_are_exact_with_their_rounding(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, quantization: str
) -> None:
    result = merge_quantised(cli, monkeypatch, kind, quantization, tmp_path)
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "merged" / "verification.json").read_text())
    if quantization == "nf4":  # int8 rounds what goes into a layer too, which no merged model does
        assert report["merge_base"] == "dequantized"
    differences = largest_differences(tmp_path)
    assert differences.keys() == {"original", "dequantized"}
    for exact, found in differences.values():
        assert exact < 1e-3
        assert exact < found


# --- weights that are not quantised ---


@pytest.mark.parametrize("kind", ["qwen3_moe", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_adapted_stacks_beside_int8_matrices_are_rounded_as_they_are_written(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    result = merge_quantised(cli, monkeypatch, kind, "int8", tmp_path, write_adapter=stacks_adapter_of)
    assert result.exit_code == 0, result.stderr
    assert all(exact < 1e-4 for exact, _ in largest_differences(tmp_path).values())
    peft = PeftModel.from_pretrained(load_plain(tmp_path / "base").double(), tmp_path / "adapter")
    expected, found = peft.merge_and_unload().state_dict(), load_plain(tmp_path / "merged").state_dict()
    stacks = [name for name in expected if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert stacks
    for name in stacks:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_float32_base_that_was_trained_on_in_16_bits_keeps_its_other_weights(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    result = merge_quantised(cli, monkeypatch, "qwen2", quantization, tmp_path, torch.float32)
    assert result.exit_code == 0, result.stderr
    differences = largest_differences(tmp_path)
    assert all(exact < 1e-4 for exact, _ in differences.values())
    if quantization == "nf4":
        assert differences["dequantized"][1] < 1e-4, "float32 loses nothing"


def drop_a_stack(updates: dict[str, TensorUpdate]) -> None:
    del updates[min(name for name in updates if ".experts." in name)]


def test_the_models_tell_that_a_stack_beside_int8_matrices_lacks_its_update(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    misread_updates(monkeypatch, drop_a_stack)
    monkeypatch.setattr(merge, "read_back", lambda *_: None)
    result = merge_quantised(cli, monkeypatch, "qwen3_moe", "int8", tmp_path, write_adapter=stacks_adapter_of)
    assert result.exit_code == Exit.MODEL, result.stderr
    assert "is not what base + adapter is" in result.stderr


def test_the_models_tell_that_an_embedding_was_rounded_as_in_training(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rounding(plan: Any, base: Any, folder: Path, advance: Any) -> None:
        write_merged(plan, base, folder, advance)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16().float()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(merge, "write_merged", rounding)
    monkeypatch.setattr(merge, "read_back", lambda *_: None)
    result = merge_quantised(cli, monkeypatch, "qwen2", "nf4", tmp_path, torch.float32)
    assert result.exit_code == Exit.MODEL, result.stderr
    assert "is not what base + adapter is" in result.stderr


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


def test_a_merge_that_is_far_on_both_bases_says_so_and_does_not_advise_what_was_done(tmp_path: Path) -> None:
    near = Parity(
        tokens=9, largest_difference=8, mean_kl=1.1, top1_agreement=0.2, clear_disagreement=0.8, largest_logit=7
    )
    job: Any = SimpleNamespace(settings=settings_of(tmp_path, "int8"))
    chosen: Any = SimpleNamespace(candidate=SimpleNamespace(merge_base="original"), parity=near)
    other: Any = SimpleNamespace(
        candidate=SimpleNamespace(merge_base="dequantized"), parity=dataclasses.replace(near, mean_kl=2.2)
    )
    with pytest.raises(LoratuneError, match=r"mean KL 1\.1 original and 2.2 dequantized") as raised:
        verify._require_right(job, chosen, [other])
    assert "--merge-base auto" not in raised.value.message
    assert "--merge-base dequantized" in raised.value.message
