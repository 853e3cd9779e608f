"""A head that the config calls tied: decided once by the files' values, and everywhere alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import Result

from loratune.errors import Exit, LoratuneError
from loratune.model.base import load_base
from loratune.model.hardware import detect_hardware
from loratune.model.tying import head_is_tied
from loratune.model.weights.mapped import load_mapped
from loratune.recipe.sections import ModelSettings

Cli = Callable[..., Result]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def model(random_qwen: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make a variant of random_qwen, whose embedding and head are one matrix."""

    def make(head: str | None, says_tied: bool = True, in_shards: bool = False) -> Path:
        folder = shutil.copytree(random_qwen, tmp_path / "base")
        tensors = load_file(folder / "model.safetensors")
        embedding = tensors[EMBEDDING]
        heads = {"equal": embedding.clone(), "other": embedding.roll(1, 0).clone(), "smaller": embedding[:-1].clone()}
        if head:
            tensors[HEAD] = heads[head]
        if in_shards:
            (folder / "model.safetensors").unlink()
            parts = {"a.safetensors": {HEAD: tensors.pop(HEAD)}, "b.safetensors": tensors}
            for name, part in parts.items():
                save_file(part, folder / name, metadata={"format": "pt"})
            places = {name: file for file, part in parts.items() for name in part}
            index = {"metadata": {"total_size": sum(t.nbytes for p in parts.values() for t in p.values())}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": places}))
        else:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": says_tied}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("in_shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize(
    ("head", "says_tied", "tied"),
    [("equal", True, True), ("other", True, False), ("equal", False, False), ("other", False, False)],
)
def test_every_way_of_loading_takes_the_head_that_transformers_takes(
    model: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    head: str,
    says_tied: bool,
    tied: bool,
    in_shards: bool,
) -> None:
    folder = model(head, says_tied, in_shards)
    loaded = load_base(ModelSettings(base="x", dtype="float32"), folder, detect_hardware())
    mapped = load_mapped(folder)
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    for found in (loaded, mapped):
        assert found.config.tie_word_embeddings is head_is_tied(folder) is tied
        torch.testing.assert_close(logits(found), expected, rtol=1e-5, atol=1e-5)
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("says tie_word_embeddings, but lm_head.weight differs") == (1 if says_tied and not tied else 0)


@pytest.mark.parametrize(
    ("head", "says_tied", "words"),
    [(None, False, "weights lack lm_head.weight"), ("smaller", True, "[3007, 32]"), ("smaller", False, "[3007, 32]")],
)
@pytest.mark.parametrize("command", ["infer", "merge", "sft"])
def test_a_head_that_leaves_no_model_is_refused_with_the_reason(
    cli: Cli, model: Callable[..., Path], short_run: Path, tmp_path: Path, rows_file: Path,
    head: str | None, says_tied: bool, words: str, command: str,
) -> None:  # fmt: skip
    folder = model(head, says_tied)
    if command == "sft":
        result = cli("sft", "--model.base", folder, "--data.train", rows_file, "--output", tmp_path / "out")
    elif command == "infer":
        result = cli("infer", "--model", folder, "--prompt", "x")
    else:
        adapter = shutil.copytree(short_run / "adapter", tmp_path / "plain")
        result = cli("merge", "-a", adapter, "-m", folder, "-o", tmp_path / "out", "--no-logits")
    assert result.exit_code == Exit.MODEL
    assert words in " ".join(result.stderr.split())


@pytest.mark.parametrize("says_tied", [True, False])
def test_a_head_of_its_own_is_merged_and_exported(
    cli: Cli, model: Callable[..., Path], short_run: Path, tmp_path: Path, says_tied: bool
) -> None:
    folder = model("other", says_tied)
    adapter = shutil.copytree(short_run / "adapter", tmp_path / "plain")
    result = cli("merge", "--adapter", adapter, "--base-model", folder, "--output", tmp_path / "merged")
    assert result.exit_code == 0, result.stderr
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(tensors[HEAD], load_file(folder / "model.safetensors")[HEAD])
    for source in (["--adapter", adapter, "--base-model", folder], ["--model", folder]):
        output = tmp_path / f"gguf-{len(source)}"
        result = cli("export", *source, "--format", "gguf", "-q", "f32", "--output", output)
        assert result.exit_code == 0, result.stderr
        assert json.loads((output / "verification.json").read_text())["logits"]["largest_difference"] < 1e-4


def test_a_tied_model_that_stores_only_its_head_is_refused(model: Callable[..., Path]) -> None:
    folder = model("equal")
    tensors = load_file(folder / "model.safetensors")
    del tensors[EMBEDDING]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoratuneError, match=r"weights lack model\.embed_tokens\.weight: .* cannot use it"):
        head_is_tied(folder)
