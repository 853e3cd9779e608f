"""Passes of hybrids and mixtures on a GPU that does not exist: devices, copies, kernels, and what kernels are given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TinyModel
from gpu_kernels import Kernels
from operators import OperatorCount, count, fake_gpu, on_fake_gpu
from safetensors.torch import load_file
from test_decoding_cost import GPU, begun, on_pages
from test_packed_families import LENGTHS, assert_same, step_by_rows, step_of, trained
from tiny_models import MIXTURES, tiny_config
from typer.testing import Result

from loratune.data.assembly.batches import collate_packed
from loratune.engine.sampling import Sampling
from loratune.model.adapter.attach import attach_adapter
from loratune.model.adapter.own_parameters import BASE
from loratune.model.adapter.plain_copy import perturbed
from loratune.model.architecture.recurrent import recurrent_modules
from loratune.model.architecture.structure import causal_model, decoder_of
from loratune.model.config import auto_class
from loratune.model.kernels import norm_mlp, packed_rows
from loratune.model.kernels.lora_linear import use_fused_lora
from loratune.model.kernels.norm_mlp import use_fused_elementwise
from loratune.model.kernels.packed_attention import VARLEN_ATTENTION, use_document_attention
from loratune.model.kernels.packed_rows import PackedRows
from loratune.model.kernels.recurrent_layers import call_modules_in_training
from loratune.recipe.method_sections import LoraSettings
from loratune.training.probes import isolation
from loratune.training.probes.isolation import why_not_apart
from loratune.training.probes.passes import packed, random_documents

HYBRIDS = ("qwen3_5", "qwen3_5_moe", "qwen3_next", "granitemoehybrid", "lfm2")
FAMILIES = (*HYBRIDS, "qwen3_moe", "gpt_oss", "gemma3")
QUICK = ("qwen3_5_moe", "gpt_oss")
TOKENS = 6
"""Of each document; 16 and 64 of them fill a row, so that no filler makes a batch of its own."""
EXPERTS = ["attention", "experts"]


def adapted(kind: str, targets: str | list[str] = "all-linear", **settings: Any) -> Any:
    """A tiny bfloat16 model with an adapter."""
    config = tiny_config(kind, **settings)
    base = auto_class(type(config)).from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    return attach_adapter(base, LoraSettings(target_modules=targets, rank=4, dropout=0.0), "base", 0)


# --- training ---


def rows(documents: int) -> list[dict[str, Any]]:
    return [{"input_ids": [1] * TOKENS, "labels": [1] * TOKENS, "sequence": number} for number in range(documents)]


def training_pass(
    monkeypatch: pytest.MonkeyPatch, kind: str, documents: int = 16, recomputed: bool = False, **settings: Any
) -> OperatorCount:
    """Count a pass on a GPU without kernels for recurrent layers, and expect a gradient of every weight.

    What is made without naming a device is on the CPU, and mixing the two is an error.
    """
    monkeypatch.setattr(norm_mlp, "_gives_the_same", lambda *_: True)  # there are no values to compare
    batch = collate_packed(rows(documents))
    with fake_gpu():
        model = adapted(kind, **settings).train()
        base = causal_model(model)
        use_fused_lora(model)
        use_fused_elementwise(base)
        call_modules_in_training(base)
        if kind == "gpt_oss":
            base.set_attn_implementation("eager")
        else:
            use_document_attention(base, VARLEN_ATTENTION)
        PackedRows(base, is_masked=kind == "gpt_oss")
        if recomputed:
            model.activation_checkpointing_enable()
            model.enable_input_require_grads()
        inputs = {name: value for name, value in on_fake_gpu(batch).items() if name not in ("about", "labels")}

        def work() -> None:
            with torch.device("cpu"):
                decoder_of(model)(**inputs, use_cache=False).last_hidden_state.sum().backward()

        counted = count(work)
        lacking = [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]
        assert lacking == []
        return counted


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k in QUICK else pytest.mark.slow) for k in FAMILIES])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_a_pass_takes_as_many_kernels_and_copies_for_many_documents(
    kind: str, recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = (training_pass(monkeypatch, kind, documents, recomputed) for documents in (16, 64))
    assert many.names == few.names
    # Where the tokens of the documents are, once for all recurrent layers.
    assert few.copies == many.copies == (kind in HYBRIDS)


@pytest.mark.parametrize(
    "kind", ["qwen3_5_moe", *(pytest.param(k, marks=pytest.mark.slow) for k in FAMILIES[2:] if k in MIXTURES)]
)
def test_experts_train_on_a_gpu_with_recomputed_layers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (training_pass(monkeypatch, kind, documents, True, targets=EXPERTS) for documents in (16, 64))
    assert many.names == few.names
    assert few.copies == many.copies == (kind in HYBRIDS)
    assert few.names["_grouped_mm"] > 0


DEEP = {"num_hidden_layers": 6, "layer_types": ["conv", "conv", "full_attention"] * 2}


def test_copies_do_not_grow_with_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert training_pass(monkeypatch, "lfm2", **DEEP).copies == 1


def test_a_copy_per_layer_would_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = packed_rows._by_document

    def compute(forward: Any, row: torch.Tensor, documents: Any) -> torch.Tensor:
        return plain(forward, row, documents._replace(places=torch.arange(16 * TOKENS).to(row.device)))

    monkeypatch.setattr(packed_rows, "_by_document", compute)
    assert training_pass(monkeypatch, "lfm2", **DEEP).copies == 1 + 4


def test_tensors_of_two_devices_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = packed_rows._by_document

    def compute(forward: Any, row: torch.Tensor, documents: Any) -> torch.Tensor:
        return plain(forward, row, documents) + torch.ones(row.shape[-1])

    monkeypatch.setattr(packed_rows, "_by_document", compute)
    with pytest.raises(RuntimeError, match="at least two devices, meta and cpu"):
        training_pass(monkeypatch, "lfm2")


# --- kernels that take the boundaries ---


ALL = {
    "qwen3_5": ("causal_conv1d_fn", "chunk_gated_delta_rule"),
    "lfm2": ("causal_conv1d_fn",),
    "granitemoehybrid": ("causal_conv1d_fn", "mamba_chunk_scan_combined"),
}
"""The kernels that keep documents apart, in the order in which a layer calls them."""


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_may_have_kernels", lambda model: True)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("kind", ALL)
def test_kernels_get_the_boundaries_of_each_pass(
    kind: str, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = Kernels(monkeypatch, kind, *ALL[kind])
    it = trained(tiny_model(kind))
    checked = it.checked()
    assert (
        checked.checks[0].result == "documents of a packed row do not see each other, by kernels in 1 recurrent layer"
    )
    documents = random_documents(it.model, LENGTHS, seed=3)
    batch = packed(it.model, documents)
    with perturbed(it.model), perturbed(it.reference):
        it.model.eval()
        kernels.borders.clear()
        assert_same(step_of(it.model, batch), step_by_rows(it.reference, documents))
    assert [name for name, _ in kernels.borders] == [*ALL[kind]]
    for name, borders in kernels.borders:
        assert borders is batch["cu_seq_lens_q" if name == "chunk_gated_delta_rule" else "seq_idx"]
    assert not any("forward" in vars(module) for module in recurrent_modules(decoder_of(it.model)))


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(("kind", "lacking"), [(kind, name) for kind, names in ALL.items() for name in names])
@pytest.mark.parametrize("is_deaf", [True, False], ids=["deaf", "missing"])
def test_layers_compute_each_document_by_itself_if_a_kernel_is_missing_or_disregards_boundaries(
    kind: str, lacking: str, is_deaf: bool, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [name for name in ALL[kind] if is_deaf or name != lacking]
    kernels = Kernels(monkeypatch, kind, *names, deaf=lacking)
    it = trained(tiny_model(kind))
    why = why_not_apart(it.model)
    assert ("see each other" if is_deaf else "can't keep packed sequences apart") in why
    told = it.checked().checks[0].result
    assert ", 1 recurrent layer computing each by itself, since with the layers as they are " in told
    assert ("see each other" if is_deaf else "can't keep packed sequences apart") in told.partition("since ")[2]
    documents = random_documents(it.model, LENGTHS, seed=3)
    with perturbed(it.model), perturbed(it.reference):
        it.model.eval()
        kernels.borders.clear()
        assert_same(step_of(it.model, packed(it.model, documents)), step_by_rows(it.reference, documents))
    assert kernels.borders == []


def step_in_training(model: Any, documents: list[list[int]]) -> dict[str, bool]:
    """Whether each weight of the adapter on `out_proj` has a gradient."""
    model.train()
    decoder_of(model)(**packed(model, documents), use_cache=False).last_hidden_state.sum().backward()
    of_output = ((name, weight) for name, weight in model.named_parameters() if "out_proj.lora_" in name)
    return {name: weight.grad is not None for name, weight in of_output}


def test_lora_on_the_output_of_mamba_trains_where_a_kernel_for_training_would_pass_over_it(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    Kernels(monkeypatch, "granitemoehybrid", "mamba_split_conv1d_scan_combined")
    it = trained(tiny_model("granitemoehybrid"))
    base = it.model.get_base_model()
    PackedRows(base)
    documents = random_documents(it.model, LENGTHS, seed=3)
    assert set(step_in_training(it.model, documents).values()) == {False}
    it.model.zero_grad()
    assert call_modules_in_training(base) == 1
    assert set(step_in_training(it.model, documents).values()) == {True}
    (mamba,) = recurrent_modules(decoder_of(it.model))
    assert mamba.out_proj.training  # as does its dropout


def test_a_run_trains_all_of_a_mamba_layer_s_adapter(
    cli: Callable[..., Result], tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Kernels(monkeypatch, "granitemoehybrid", "mamba_split_conv1d_scan_combined")
    rows = [{"instruction": f"How much is {n}+{n}?", "output": f"It is {2 * n}."} for n in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    result = cli(
        "sft", "--model.base", tiny_model("granitemoehybrid"), "--model.dtype", "float32", "--data.train",
        tmp_path / "rows.json", "--data.validation", "0", "--training.batch_size", "4", "--training.max_steps", "1",
        "--training.warmup", "0", "--evaluation.questions_share", "0", "--output", tmp_path / "run",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {name: bool(weight.any()) for name, weight in weights.items() if "lora_B" in name and not weight.any()} == {}
    assert any("mamba.out_proj.lora_B" in name for name in weights)


# --- decoding ---


@pytest.mark.parametrize(
    "kind", ["qwen3_5", *(pytest.param(k, marks=pytest.mark.slow) for k in FAMILIES if k not in ("qwen3_5", "gpt_oss"))]
)
@pytest.mark.parametrize("has_pages", [True, False], ids=["pages", "slots"])
@pytest.mark.parametrize("names", [["default"], ["default"] * 8, ["default", BASE]], ids=["1", "8", "mixed"])
def test_a_step_copies_little_to_a_gpu_and_reads_once(
    kind: str, has_pages: bool, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts and single tokens; all tensors of a step are on the GPU but the two that are copied."""
    model = adapted(kind, "attention").eval().to("meta")
    gpu = GPU(monkeypatch)
    decoder = begun(model, Sampling(), names, on_pages if has_pages else lambda decoder: None)
    assert decoder._cache.has_states == (kind in HYBRIDS)
    gpu.reads = 0
    with OperatorCount() as counted:
        decoder.step()
    assert counted.copies == 2
    assert gpu.reads == 1
