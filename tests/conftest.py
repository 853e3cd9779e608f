"""Fixtures: a throwaway Qwen2 of random weights with the practice model's tokenizer, small row files, the CLI."""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import shutil
import signal
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from documents import require_one_document
from processes import COMMAND_LINE, Nursery, Program, opened_nursery
from typer.testing import CliRunner, Result

from loratune.data.encoding.encoder import Example

TINY_QWEN = Path(__file__).resolve().parent.parent / "loratune" / "assets" / "tiny-qwen"
ROWS = [{"instruction": f"How much is {n}+{n}?", "input": "", "output": f"It is {2 * n}."} for n in range(12)]

TinyModel = Callable[[str], Path]
"""The folder of a family's tiny model."""


@pytest.fixture(scope="session")
def _spared() -> set[str]:
    """Modules whose objects the collector leaves alone."""
    gc.set_threshold(10_000, 10, 10)
    return set()


@pytest.fixture(scope="module", autouse=True)
def _collector_leaves_the_libraries_alone(_spared: set[str]) -> None:
    """Otherwise it goes through all that torch has loaded again and again: a tenth of the time of all tests."""
    if len(sys.modules) > len(_spared) + 200:
        _spared.update(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, encoded_rows: Path) -> None:
    """Nothing of the caller's environment reaches a test, and nothing may ask a hub."""
    monkeypatch.setenv("LORATUNE_CACHE", str(encoded_rows))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "LORATUNE_DEBUG", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "20000")  # no message is broken into lines, however long the paths in it are
    for size in ("_width", "_height"):  # which rich keeps, where COLUMNS and LINES are set when it is imported
        monkeypatch.setattr(f"loratune.console.stderr.{size}", None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _memory_is_predicted_where_it_matters(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other runs are like those of a model that cannot be run without values: it takes half of a tiny run's time."""
    if not request.node.get_closest_marker("predicts_memory"):
        monkeypatch.setattr("loratune.training.session._predicted", lambda *prepared: None)


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
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Write a family's tiny model once; all tests share its folder, and none changes it."""
    from tiny_models import make_tiny_model

    folder = tmp_path_factory.mktemp("tiny-models")
    return functools.cache(lambda kind: make_tiny_model(kind, folder / kind))


@pytest.fixture(scope="session")
def _gguf_vocabularies_are_read_from_arrays() -> None:
    """numpy makes a slice of a mapped file at several times the cost of an array's; a vocabulary is ten thousands."""
    import gguf
    import numpy as np

    plain = gguf.GGUFReader._get

    def get(self: Any, *arguments: Any, **settings: Any) -> Any:
        self.data = self.data.view(np.ndarray)
        return plain(self, *arguments, **settings)

    gguf.GGUFReader._get = get


@pytest.fixture(scope="session")
def random_qwen(tmp_path_factory: pytest.TempPathFactory, _gguf_vocabularies_are_read_from_arrays: None) -> Path:
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
def quick_end(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Shorten what follows each training: few tokens are asked for, and the picture's lines are not made pixels.

    Tests of the end itself are marked with `whole_end`.
    """

    def shorten() -> None:
        if request.node.get_closest_marker("whole_end"):
            return
        for limit in ("COMPARED_TOKENS", "MAX_TOKENS"):
            monkeypatch.setattr(f"loratune.training.reporting.answers.{limit}", 8)
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, path: Path(path).write_bytes(b"drawn"))
        monkeypatch.setattr("accelerate.utils.memory.clear_device_cache", lambda **_: None)  # collects garbage

    return shorten


@pytest.fixture
def cli(quick_end: Callable[[], None]) -> Callable[..., Result]:
    """Run a loratune command line in this process; the result holds exit_code, stdout and stderr.

    With --json, stdout has to be one document that fits its schema, in whatever test.
    """
    from loratune.cli.app import app

    def run(*arguments: Any, **options: Any) -> Result:
        if arguments[:1] == ("sft",) and "--show" not in arguments:
            quick_end()
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], **options)
        if "--json" in arguments:
            require_one_document(result)
        return result

    return run


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    with opened_nursery() as nursery:
        yield nursery


@pytest.fixture
def start(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Program]]:
    """Start a loratune command line, or other code, in a process of its own that ends with the test at the latest."""
    started: list[Program] = []

    def run(*arguments: Any, code: str = COMMAND_LINE) -> Program:
        line = ["loratune", *map(str, arguments)]
        started.append(nursery.start(tmp_path_factory.mktemp("program"), code, line))
        return started[-1]

    yield run
    for program in started:
        program.kill()


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


@pytest.fixture(scope="session")
def few_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tenth of the general texts of evaluations, which take seconds to read."""
    folder = tmp_path_factory.mktemp("general")
    for path in (TINY_QWEN.parent / "general").iterdir():
        rows = json.loads(path.read_text(encoding="utf-8"))
        (folder / path.name).write_text(json.dumps(rows[::10]), encoding="utf-8")
    return folder


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
