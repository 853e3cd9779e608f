"""What a step takes of the memory, what is free, and when activations are computed twice."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Lfm2Config, Lfm2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from typer.testing import Result

from loratune.model import memory
from loratune.model.hardware import detect_hardware
from loratune.model.kernels.lora_linear import use_fused_lora
from loratune.model.kernels.packed_attention import use_document_attention
from loratune.training.activations import measure_activations

MB = 2**20


@pytest.fixture
def sft(cli: Callable[..., Result], random_qwen: Path, rows_file: Path, tmp_path: Path) -> Callable[..., Result]:
    """Run `loratune sft` for a few steps on the random model."""

    def run(name: str, *flags: Any) -> Result:
        return cli(
            "sft", "--model.base", random_qwen, "--model.dtype", "float32", "--data.train", rows_file,
            "--training.max_steps", "3", "--lora.dropout", "0", "--output", tmp_path / name, *flags,
        )  # fmt: skip

    return run


def group(folder: Path, version: int, limit: str, used: int, cached: int) -> None:
    """The files in which Linux tells a container its memory."""
    names = memory.GROUPS[0] if version == 2 else memory.GROUPS[1]
    statistics = f"anon 5\ninactive_file {cached}\n"
    for name, text in zip(names, (limit + "\n", f"{used}\n", statistics), strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_s_bound_counts_without_the_cache_of_files(tmp_path: Path, version: int) -> None:
    group(tmp_path, version, str(100 * MB), 70 * MB, 20 * MB)
    assert memory._free_in_group(tmp_path) == [50 * MB]


def test_no_bound_is_none(tmp_path: Path) -> None:
    assert memory._free_in_group(tmp_path) == []
    group(tmp_path, 2, "max", 70 * MB, 20 * MB)
    assert memory._free_in_group(tmp_path) == []
    (tmp_path / "memory.stat").write_text("a b c\n")
    assert memory._free_in_group(tmp_path) == []


def test_free_memory_is_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = memory.free_memory_bytes(detect_hardware())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_memory_bytes(detect_hardware()) == pytest.approx(alone / 4, rel=0.2)
    assert 0 < alone < 2**44


def test_a_step_takes_what_the_allocator_hands_out(random_qwen: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(random_qwen, dtype=torch.float32)
    use_document_attention(model)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
    use_fused_lora(adapted)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    found = measure_activations(adapted, 128, 128, True, detect_hardware())
    assert torch.equal(torch.get_rng_state(), before)
    inputs = torch.arange(128)[None]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        hidden = adapted.get_base_model().model(inputs, use_cache=False).last_hidden_state
    held = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    assert hidden.requires_grad
    assert found.kept_bytes == pytest.approx(held, rel=0.1)
    assert found.needed_bytes > found.kept_bytes


def test_borders_of_documents_are_passed_only_where_rows_are_packed() -> None:
    """transformers refuses them where a layer with a state cannot keep documents apart, as here without its kernel."""
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False,
    )  # fmt: skip
    adapted = get_peft_model(Lfm2ForCausalLM(config), LoraConfig(r=4, target_modules="all-linear"))
    assert measure_activations(adapted, 128, 70, False, detect_hardware()).kept_bytes > 0
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        measure_activations(adapted, 128, 70, True, detect_hardware())


@contextmanager
def counted_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    """Has a line for every time that an attention layer computes."""
    calls: list[None] = []
    plain = Qwen2Attention.forward

    def forward(self: Any, *arguments: Any, **settings: Any) -> Any:
        calls.append(None)
        return plain(self, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(Qwen2Attention, "forward", forward)
        yield calls


def test_activations_are_computed_again_only_where_they_do_not_fit(
    sft: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with counted_attention(monkeypatch) as roomy_calls:
        assert sft("roomy").exit_code == 0
    monkeypatch.setattr("loratune.training.activations.free_memory_bytes", lambda hardware: 10_000)
    with counted_attention(monkeypatch) as tight_calls:
        tight = sft("tight")
    assert tight.exit_code == 0
    assert "gradient checkpointing" in " ".join(tight.stderr.split())
    with counted_attention(monkeypatch) as forced_calls:
        forced = sft("forced", "--no-training.gradient_checkpointing")
    assert "a step" not in forced.stderr
    # Two layers in three steps of several batches are gone through a second time; the look beforehand once more.
    assert len(tight_calls) >= len(roomy_calls) + 2 * 3
    assert len(forced_calls) == len(roomy_calls) - 2
    reports = {name: json.loads((tmp_path / name / "report.json").read_text()) for name in ("roomy", "tight", "forced")}
    assert {name: report["gradient_checkpointing"] for name, report in reports.items()} == {
        "roomy": False, "tight": True, "forced": False,
    }  # fmt: skip
    weights = [load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in reports]
    for name, values in weights[0].items():
        for other in weights[1:]:
            torch.testing.assert_close(values, other[name], atol=1e-6, rtol=1e-5)
