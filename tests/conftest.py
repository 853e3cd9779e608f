"""Fixtures: a throwaway Qwen2 of random weights with the practice model's tokenizer, small row files, the CLI."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from loratune.data.encoding.encoder import Example

TINY_QWEN = Path(__file__).resolve().parent.parent / "loratune" / "assets" / "tiny-qwen"
ROWS = [{"instruction": f"How much is {n}+{n}?", "input": "", "output": f"It is {2 * n}."} for n in range(12)]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, encoded_rows: Path) -> None:
    """Nothing of the caller's environment reaches a test, and nothing may ask a hub."""
    monkeypatch.setenv("LORATUNE_CACHE", str(encoded_rows))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LORATUNE_DEBUG", "COLUMNS", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _signals_are_not_ignored() -> Iterator[None]:
    """As they are in a shell's background job, and under nohup."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    for number, known in before.items():
        signal.signal(number, known)


@pytest.fixture(scope="session")
def encoded_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all tests keep encoded rows."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def random_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a two-layer Qwen2 with random float32 weights; sizes differ so that a transposition shows."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from loratune.runs.tokenizer_files import copy_tokenizer_files

    folder = tmp_path_factory.mktemp("models") / "random-qwen"
    vocabulary = json.loads((TINY_QWEN / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    copy_tokenizer_files(TINY_QWEN, folder)
    shutil.copyfile(TINY_QWEN / "generation_config.json", folder / "generation_config.json")
    return folder


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Twelve short Alpaca rows."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    return path


@pytest.fixture
def cli() -> Callable[..., Result]:
    """Run a loratune command line in this process; the result holds exit_code, stdout and stderr."""
    from loratune.cli.app import app

    def run(*arguments: Any, **options: Any) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)

    return run


@pytest.fixture(scope="session")
def short_run(random_qwen: Path, encoded_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps on random_qwen in float32; not to be changed."""
    from loratune.cli.app import app

    os.environ["LORATUNE_CACHE"] = str(encoded_rows)
    folder = tmp_path_factory.mktemp("trained")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    flags = ["--model.dtype", "float32", "--data.validation", "0.2", "--training.max_steps", "4"]
    flags += ["--training.learning_rate", "5e-3", "--data.train", str(folder / "rows.json")]
    result = CliRunner().invoke(app, ["sft", "--model.base", str(random_qwen), "--output", str(folder / "run"), *flags])
    assert result.exit_code == 0, result.stderr
    return folder / "run"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Where the merged model goes; nothing else is in the folder above."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "merged"


def example_of(input_ids: list[int], labels: list[int]) -> Example:
    """A training sequence from plain lists."""
    return Example(array("i", input_ids), array("i", labels))


def tree(folder: Path) -> dict[str, str]:
    """Everything below a folder with the hashes of its files."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def give_back_forwards(model: Any) -> None:
    """Let every module compute again as its class does."""
    for module in model.modules():
        vars(module).pop("forward", None)
