"""Proofs of merges on a GPU that computes on the CPU: nothing is left on the CPU, and the figures are the CPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from card import card
from test_merge import make_adapter, make_model, small
from test_rounding import KINDS
from test_update import rows_of
from transformers import Qwen2Config

from loratune.delivery.verification import place
from loratune.delivery.verification.parity import InState, compare_models
from loratune.delivery.verification.place import run_proof
from loratune.errors import Exit, LoratuneError
from loratune.model.adapter.peft_merge import PeftMerge
from loratune.model.hardware import Hardware, cpu_hardware
from loratune.model.weights.mapped import load_mapped
from loratune.model.weights.reference import load_reference
from loratune.model.weights.rounding import Rounding, rounded_as
from loratune.model.weights.stack import Stack
from loratune.recipe.sections import ModelSettings

pytestmark = pytest.mark.filterwarnings("ignore:Adapter .* have invalid shape. .*lora_B.bias")


def figures(base: Path, adapter: Path, hardware: Any) -> list[Any]:
    """Compare base + adapter, and the same with roundings and noise, with the base."""
    settings = ModelSettings(base=str(base))
    one = load_reference(settings, base, adapter, hardware)
    changes = PeftMerge(base, adapter, len(one.get_input_embeddings().weight), False).changes
    roundings = {name: Rounding(torch.bfloat16, change, seed=(1, 2)) for name, change in changes.items()}
    alone = load_mapped(base, device=hardware.device)
    rounded = InState(one, lambda: rounded_as(one, roundings))
    return compare_models(one, [alone, rounded], rows_of(40, 60))


@pytest.mark.parametrize("kind", KINDS)
def test_a_proof_on_a_gpu_has_the_figures_of_the_cpu(kind: str, tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", small(Qwen2Config, tie_word_embeddings=False), torch.bfloat16)
    make_adapter(base, tmp_path / "adapter", **KINDS[kind])
    expected = figures(base, tmp_path / "adapter", cpu_hardware())
    with card() as hardware:
        found = figures(base, tmp_path / "adapter", hardware)
    for one, other in zip(expected, found, strict=True):
        assert other.largest_difference == pytest.approx(one.largest_difference, rel=1e-3, abs=1e-5)
        assert other.mean_kl == pytest.approx(one.mean_kl, rel=1e-3, abs=1e-6)
        assert one.largest_difference > 0


def test_a_matrix_of_a_stack_is_read_and_rounded_on_a_gpu() -> None:
    values = torch.randn(3, 4, 5).bfloat16()

    def matrix(device: torch.device) -> torch.Tensor:
        stack = Stack(lambda number: values[number].to(device), values.shape, device)
        stack.changes.append(lambda found, _: found + 1 / 3)
        stack.changes.append(Rounding(torch.float16, seed=(1, 2)).written)
        return stack[1]

    with card() as hardware:
        found = matrix(hardware.device)
        assert found.device == hardware.device
        assert torch.equal(found.cpu(), matrix(torch.device("cpu")))


def test_what_is_left_on_the_cpu_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_model(tmp_path / "base", small(Qwen2Config), torch.bfloat16)
    make_adapter(base, tmp_path / "adapter")
    monkeypatch.setattr(Rounding, "_noise", lambda _, exact, __: torch.zeros(exact.shape, device="cpu"))
    with card() as hardware, pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        figures(base, tmp_path / "adapter", hardware)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    gpu = Hardware(torch.device("cuda", 0), True, "a card")
    monkeypatch.setattr(place, "detect_hardware", lambda: gpu)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), MemoryError()]
)
@pytest.mark.usefixtures("one_gpu")
def test_a_proof_for_which_a_gpu_has_no_room_runs_on_the_cpu(error: Exception, capsys: Any) -> None:
    asked = []

    def work(hardware: Hardware) -> str:
        asked.append(hardware.device.type)
        if hardware.is_gpu:
            raise error
        return "proved"

    assert run_proof(work) == ("proved", cpu_hardware().name)
    assert asked == ["cuda", "cpu"]
    assert "since on a card its memory runs out" in " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("one_gpu")
@pytest.mark.parametrize("error", [RuntimeError("wrong"), LoratuneError("the models differ", Exit.MODEL)], ids=str)
def test_the_verdict_of_the_cpu_counts_where_a_gpu_has_another(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(hardware: Hardware) -> str:
        if hardware.is_gpu:
            raise error
        return "proved"

    assert run_proof(work) == ("proved", cpu_hardware().name)
    assert str(error) in " ".join(capsys.readouterr().err.split())


def test_an_error_on_the_cpu_too_ends_the_proof() -> None:
    def work(_: Hardware) -> None:
        raise LoratuneError("the models differ", Exit.MODEL)

    with pytest.raises(LoratuneError, match="the models differ"):
        run_proof(work)


@pytest.mark.usefixtures("one_gpu")
def test_float32_products_of_a_proof_are_not_tf32() -> None:
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = True
        allowed, _ = run_proof(lambda _: [switch.allow_tf32 for switch in switches])
        assert allowed == [False, False]
        assert [switch.allow_tf32 for switch in switches] == [True, True]
    finally:
        for switch, was_allowed in zip(switches, before, strict=True):
            switch.allow_tf32 = was_allowed
