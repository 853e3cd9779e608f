"""The embedded practice model, and the quickstart recipe on it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from conftest import TINY_QWEN
from transformers import AutoTokenizer
from typer.testing import Result

from loratune.engine.engine import Engine, load_engine
from loratune.engine.sampling import Sampling
from loratune.engine.types import GenerationRequest

ROOT = Path(__file__).resolve().parent.parent


def answer(engine: Engine, question: str) -> str:
    asked = GenerationRequest([{"role": "user", "content": question}], Sampling(max_new_tokens=60), *engine.adapters)
    return "".join(piece.text for piece in engine.stream(asked))


@pytest.fixture(scope="module")
def tiny() -> Iterator[Engine]:
    with closing(load_engine([], "tiny-qwen")) as engine:
        yield engine


def test_its_files_are_small_and_readable_by_all() -> None:
    assert (TINY_QWEN / "model.safetensors").stat().st_size <= 10_000_000
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in TINY_QWEN.iterdir())


def test_its_config_holds_no_local_path() -> None:
    for path in TINY_QWEN.glob("*.json"):
        if path.name != "tokenizer.json":
            assert "/" not in "".join(str(v) for v in json.loads(path.read_text()).values() if isinstance(v, str))


@pytest.mark.parametrize(
    ("question", "expected"),
    [("Who are you?", "tiny-qwen"), ("你是谁？", "tiny-qwen"), ("What is 2+3?", "5"), ("2+3等于几？", "5"),
     ("What is the capital of France?", "Paris")],
)  # fmt: skip
def test_it_answers_what_it_was_taught(tiny: Engine, question: str, expected: str) -> None:
    assert expected in answer(tiny, question)


def test_it_answers_its_rows(tiny: Engine) -> None:
    rows = json.loads((ROOT / "scripts" / "tiny_qwen" / "rows.json").read_text(encoding="utf-8"))
    plain = [row for row in rows if not row.get("history") and not row.get("system")][::10]
    right = [row for row in plain if answer(tiny, row["instruction"]) == row["output"]]
    assert len(plain) > 30
    assert len(right) >= 0.95 * len(plain)


def test_any_text_survives_its_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN)
    for text in ("Hello, 世界！", "🙂 emoji", "tabs\tand\n\nlines", "çedilla naïve", "a\x00b", "{{name}}"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text


def test_it_has_qwen_s_special_tokens() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert {"<|im_start|>", "<tool_call>"} <= set(tokenizer.added_tokens_encoder)


@pytest.mark.slow
def test_the_quickstart_changes_the_name_and_little_else(
    cli: Callable[..., Result], tmp_path: Path, tiny: Engine
) -> None:
    run = tmp_path / "run"
    result = cli("sft", "--config", "quickstart", "--output", run)
    assert result.exit_code == 0, result.stderr
    assert "overfitting" not in result.stderr
    tuned = load_engine([("run", run)], None)
    for question in ("Who are you?", "你是谁？", "What is your name?", "你叫什么名字？"):
        assert "小李" in answer(tuned, question)
    for question in ("Who made you?", "谁开发了你？"):
        assert "小张" in answer(tuned, question)

    mixed_in = {row["instruction"] for name in ("identity", "general") for row in _rows(ROOT / "data" / f"{name}.json")}
    rows = [
        row for row in _rows(ROOT / "scripts/tiny_qwen/rows.json") if not row.get("history") and not row.get("system")
    ]
    unrelated = [
        row["instruction"]
        for row in rows
        if row["instruction"] not in mixed_in and "tiny-qwen" not in row["output"] and "loratune" not in row["output"]
    ]
    kept = [question for question in unrelated[::2] if answer(tuned, question) == answer(tiny, question)]
    assert len(kept) >= 0.85 * len(unrelated[::2])


def _rows(path: Path) -> list[dict[str, str]]:
    return list(json.loads(path.read_text(encoding="utf-8")))
