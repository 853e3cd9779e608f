"""Which attention packed rows get on which hardware, and with what reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from operators import varlen_by_mask
from transformers import AutoModelForCausalLM
from typer.testing import Result

from loratune.model.hardware import Hardware, detect_hardware
from loratune.model.kernels import packed_attention
from loratune.model.kernels.attention_choice import choose_attention
from loratune.model.kernels.packed_attention import DOCUMENT_ATTENTION, VARLEN_ATTENTION

T4, A100 = (7, 5), (8, 0)


def card(capability: tuple[int, int]) -> Hardware:
    return Hardware(torch.device("cuda", 0), capability >= A100, "a card", 1, capability)


@pytest.fixture
def model(random_qwen: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """In bfloat16, where the kernel of a GPU has a stand-in."""
    monkeypatch.setattr(packed_attention, "varlen_attn", varlen_by_mask)
    return AutoModelForCausalLM.from_pretrained(random_qwen, dtype=torch.bfloat16)


def test_one_kernel_serves_all_documents_where_it_runs(model: Any) -> None:
    chosen = choose_attention(model, card(A100), "auto", is_packed=True)
    assert str(chosen) == "varlen: one kernel for all documents of a batch"
    assert model.config._attn_implementation == VARLEN_ATTENTION


def without_kernel(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_attention, "varlen_attn", None)


def failing_kernel(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(packed_attention, "varlen_attn", fail)


def wrong_kernel(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def see_all(*tensors: Any, window_size: tuple[int, int], **settings: Any) -> Any:
        return varlen_by_mask(*tensors, **settings)

    monkeypatch.setattr(packed_attention, "varlen_attn", see_all)


def float32(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.float()


def dropout(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.config.attention_dropout = 0.1


def other_attention(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model), "_supports_flash_attn", False)


@pytest.mark.parametrize(
    ("change", "capability", "reason"),
    [
        (None, T4, "since a card has compute capability 7.5 < 8.0"),
        (None, None, "without a GPU"),
        (float32, A100, "since the model computes in float32"),
        (dropout, A100, "since its kernel has no dropout"),
        (other_attention, A100, "since Qwen2ForCausalLM has attention that its kernel does not know"),
        (without_kernel, A100, f"since torch's kernel for several documents fails: torch {torch.__version__} has none"),
        (failing_kernel, A100, "since torch's kernel for several documents fails: no kernel image"),
        (wrong_kernel, A100, "since torch's kernel for several documents gives other results"),
    ],
)
def test_elsewhere_each_document_is_a_call_of_sdpa(
    model: Any,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Any, pytest.MonkeyPatch], None] | None,
    capability: tuple[int, int] | None,
    reason: str,
) -> None:
    if change:
        change(model, monkeypatch)
    hardware = card(capability) if capability else detect_hardware()
    assert str(choose_attention(model, hardware, "auto", is_packed=True)) == f"sdpa: one call per document, {reason}"
    assert model.config._attn_implementation == DOCUMENT_ATTENTION


def test_a_recipe_decides_and_padded_batches_keep_what_was_loaded(model: Any) -> None:
    assert str(choose_attention(model, card(A100), "eager", is_packed=True)) == "sdpa: as the recipe says"
    assert str(choose_attention(model, card(A100), "auto", is_packed=False)) == "sdpa"
    assert model.config._attn_implementation == "sdpa"
    told = str(choose_attention(model, card(A100), "sdpa", is_packed=True))
    assert told == "sdpa: one call per document, as the recipe says"
    assert model.config._attn_implementation == DOCUMENT_ATTENTION


def test_flash_attention_that_was_loaded_stays_where_torch_s_kernel_cannot_run(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.config._attn_implementation_internal = "flash_attention_2"
    failing_kernel(model, monkeypatch)
    told = str(choose_attention(model, card(A100), "auto", is_packed=True))
    assert told.startswith("flash_attention_2: one kernel for all documents of a batch; not torch's, since")
    assert model.config._attn_implementation == "flash_attention_2"


def test_the_start_of_a_run_shows_it(
    cli: Callable[..., Result], random_qwen: Path, rows_file: Path, tmp_path: Path
) -> None:
    flags = ["--training.max_steps", "1", "--evaluation.questions_share", "0", "--output", tmp_path / "run"]
    done = cli("sft", "--model.base", random_qwen, "--data.train", rows_file, *flags)
    assert done.exit_code == 0, done.stderr
    assert "attention sdpa: one call per document, without a GPU" in " ".join(done.stderr.split())
