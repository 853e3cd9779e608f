"""Embedding and head trained in full: merged and exported, they compute what PEFT computes, tied or not."""

from __future__ import annotations

import itertools
import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import Result

from loratune.delivery.export.gguf.reference import load_gguf
from loratune.model.hardware import detect_hardware

Cli = Callable[..., Result]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROWS, GROWN_ROWS = 3008, 3012
IDS = torch.tensor([[5, 6, 7, 8, 2000, 3000, 41, 40]])
SAVED = {"embedding": ["embed_tokens"], "head": ["lm_head"], "both": ["embed_tokens", "lm_head"]}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TIED, GROWN, HAS_BFLOAT16 = ("untied", "tied"), ("same", "grown"), ("without bf16", "with bf16")
MATRIX = list(itertools.product(TIED, SAVED, GROWN, DTYPES, HAS_BFLOAT16))
QUICK = [
    ("tied", "embedding", "same", "bfloat16", "without bf16"),
    ("tied", "head", "grown", "bfloat16", "with bf16"),
    ("untied", "both", "same", "float16", "without bf16"),
]
CASES = [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow, id=", ".join(case)) for case in MATRIX]


@pytest.fixture
def base_of(random_qwen: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make a variant of random_qwen."""

    def make(tied: str, dtype: str) -> Path:
        folder = shutil.copytree(random_qwen, tmp_path / "base")
        tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in load_file(folder / "model.safetensors").items()}
        if tied == "untied":
            tensors[HEAD] = tensors[EMBEDDING].roll(1, 0).clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        path = folder / "config.json"
        changes = {"tie_word_embeddings": tied == "tied", "dtype": dtype}
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return folder

    return make


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Be a machine with products of bfloat16, or one without, for all who ask what the machine can do."""

    def simulate(kind: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda: kind == "with bf16")
        assert detect_hardware().has_bfloat16 == (kind == "with bf16")

    return simulate


def make_adapter(folder: Path, base: Path, saved: Sequence[str], grown: str, has_bfloat16: str) -> Path:
    """An adapter as training leaves it on such a machine: the base in bfloat16, or in float32."""
    torch.manual_seed(1)
    dtype = torch.bfloat16 if has_bfloat16 == "with bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    is_tied = model.config.tie_word_embeddings
    if grown == "grown":
        model.resize_token_embeddings(GROWN_ROWS, mean_resizing=False)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], modules_to_save=list(saved),
        ensure_weight_tying=is_tied and saved == ["embed_tokens"], base_model_name_or_path=str(base),
    )  # fmt: skip
    with warnings.catch_warnings():  # PEFT speaks of tied and of resized embeddings
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, config)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter += 0.05 * torch.randn_like(parameter)
        adapted.save_pretrained(folder, save_embedding_layers=grown == "grown")
    return folder


def logits_of(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(IDS).logits.double()
    return found


def peft_logits(base: Path, adapter: Path | None, rows: int) -> torch.Tensor:
    """Computed by transformers and PEFT alone, in float64."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    if rows != len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(rows, mean_resizing=False)
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
        model = model.double()
    return logits_of(model)


@pytest.mark.parametrize(("tied", "saved", "grown", "dtype", "has_bfloat16"), CASES)
def test_what_is_saved_in_full_is_merged_as_peft_computes_it(
    cli: Cli, base_of: Callable[..., Path], simulate: Callable[[str], None], tmp_path: Path,
    tied: str, saved: str, grown: str, dtype: str, has_bfloat16: str,
) -> None:  # fmt: skip
    simulate(has_bfloat16)
    base = base_of(tied, dtype)
    adapter = make_adapter(tmp_path / "adapter", base, SAVED[saved], grown, has_bfloat16)
    rows = GROWN_ROWS if grown == "grown" else ROWS
    expected, plain = peft_logits(base, adapter, rows), peft_logits(base, None, rows)
    # Rounding of weights and of what they are multiplied with, in some ten layers after each other.
    tolerance = 10 * torch.finfo(DTYPES[dtype]).eps * float(expected.abs().max())
    assert float((expected - plain)[..., :ROWS].abs().max()) > 3 * tolerance

    result = cli("merge", "--adapter", adapter, "--base-model", base, "--output", tmp_path / "merged")
    assert result.exit_code == 0, result.stderr
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64)
    torch.testing.assert_close(logits_of(merged), expected, rtol=0, atol=tolerance)

    if grown == "grown":  # the tokenizer has no tokens for the new rows, and GGUF wants a token for each
        return
    given = ["--adapter", adapter, "--base-model", base, "--format", "gguf", "-q", "f32", "--output", tmp_path / "gguf"]
    result = cli("export", *given)
    assert result.exit_code == 0, result.stderr
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    torch.testing.assert_close(logits_of(load_gguf(file)), expected, rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("has_bfloat16", HAS_BFLOAT16)
@pytest.mark.parametrize("saved", SAVED)
def test_a_training_in_full_goes_all_the_way(
    cli: Cli, base_of: Callable[..., Path], simulate: Callable[[str], None], rows_file: Path, tmp_path: Path,
    saved: str, has_bfloat16: str,
) -> None:  # fmt: skip
    simulate(has_bfloat16)
    base, run = base_of("tied", "bfloat16"), tmp_path / "run"
    saving = ["--lora.modules_to_save", ",".join(SAVED[saved])]
    steps = ["--training.max_steps", 3, "--training.learning_rate", "1e-2"]
    result = cli("sft", "--model.base", base, "--data.train", rows_file, *steps, *saving, "--output", run)
    assert result.exit_code == 0, result.stderr
    result = cli("merge", "--adapter", run, "--output", tmp_path / "merged")
    assert result.exit_code == 0, result.stderr
    expected = peft_logits(base, run / "adapter", ROWS)
    merged = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float64))
    tolerance = 10 * torch.finfo(torch.bfloat16).eps * float(expected.abs().max())
    torch.testing.assert_close(merged, expected, rtol=0, atol=tolerance)
    result = cli("export", "--adapter", run, "--format", "gguf", "-q", "f16", "--output", tmp_path / "gguf")
    assert result.exit_code == 0, result.stderr
