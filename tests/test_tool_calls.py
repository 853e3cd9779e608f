"""Which parser a server needs for the calls that a chat template writes."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_QWEN
from typer.testing import Result

from loratune.data.encoding.encoder import Encoder
from loratune.data.template.reasoning_form import ReasoningForm
from loratune.delivery.export.servers.flags import Parsers, find_parsers
from loratune.delivery.export.servers.reasoning import vllm_reasoning_parser
from loratune.delivery.export.servers.tool_calls import vllm_tool_parser
from loratune.errors import Exit, LoratuneError
from loratune.model.tokenizer import load_tokenizer
from loratune.recipe.sections import PromptSettings
from loratune.runs.opening import AdapterSource

FOREIGN = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}CALL {{ c.function.name }}({{ c.function.arguments.city }}){% endfor %}"
    "{% endfor %}"
)


def encoder_of(template: str) -> Encoder:
    tokenizer = load_tokenizer(TINY_QWEN)
    tokenizer.chat_template = template
    return Encoder(tokenizer, PromptSettings())


@pytest.mark.parametrize(
    ("template", "offers", "parser"),
    [
        ("qwen2_5", True, "hermes"),
        ("qwen3", True, "hermes"),
        ("qwen3_instruct_2507", True, "hermes"),
        ("qwen3_5_think", True, "qwen3_coder"),
        ("qwen3_8", True, "qwen3_coder"),
        ("llama3_1", True, "llama3_json"),
        ("glm4moe", True, None),
        ("gemma3", False, None),
        ("deepseekv3", False, None),
    ],
)
def test_the_form_of_calls_is_found_in_what_the_template_writes(
    template: str, offers: bool, parser: str | None
) -> None:
    text = (files("trl") / "chat_templates" / f"{template}.jinja").read_text("utf-8")
    encoder = encoder_of(text)
    assert encoder.offers_tools is offers
    assert vllm_tool_parser(encoder.call_form) == parser


def test_a_form_of_nobody_s_has_no_parser() -> None:
    encoder = encoder_of(FOREIGN)
    assert encoder.offers_tools
    assert vllm_tool_parser(encoder.call_form) is None


@pytest.fixture(scope="module")
def run_of_a_model_with_tools(random_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from typer.testing import CliRunner

    from loratune.cli.app import app

    folder = tmp_path_factory.mktemp("tools")
    base, rows = folder / "base", folder / "rows.json"
    base.mkdir()
    for path in random_qwen.iterdir():
        if path.name != "chat_template.jinja":
            (base / path.name).symlink_to(path)
    template = files("trl") / "chat_templates" / "qwen2_5.jinja"
    (base / "chat_template.jinja").write_text(template.read_text("utf-8"), encoding="utf-8")
    rows.write_text(json.dumps([{"instruction": f"{n}+1?", "output": str(n + 1)} for n in range(6)]))
    arguments = [
        "sft",
        "--model.base",
        base,
        "--data.train",
        rows,
        "--training.max_steps",
        2,
        "--output",
        folder / "run",
    ]
    arguments += ["--model.dtype", "float32", "--training.learning_rate", 1e-2]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.stderr
    return folder / "run"


def test_vllm_s_line_switches_tool_calls_on(
    cli: Callable[..., Result], run_of_a_model_with_tools: Path, tmp_path: Path
) -> None:
    done = cli("export", "--adapter", run_of_a_model_with_tools, "--format", "vllm", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    words = shlex.split(done.stdout)
    assert "--enable-auto-tool-choice" in words
    assert words[words.index("--tool-call-parser") + 1] == "hermes"


def test_ollama_s_export_offers_the_tools_of_the_model(
    cli: Callable[..., Result], run_of_a_model_with_tools: Path, tmp_path: Path
) -> None:
    done = cli("export", "--adapter", run_of_a_model_with_tools, "--format", "ollama", "--output", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert "range $i, $_ := .Tools" in (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")
    assert "does not support tools" not in " ".join(done.stderr.split())


def test_ollama_s_export_says_that_tools_are_lost_before_it_merges(
    cli: Callable[..., Result], run_of_a_model_with_tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, merges = tmp_path / "base", list[str]()
    shutil.copytree(run_of_a_model_with_tools.parent / "base", base)
    (base / "chat_template.jinja").write_text(
        (base / "chat_template.jinja").read_text("utf-8").replace("tool | tojson", "tool.function.name")
    )
    adapter = tmp_path / "adapter"
    shutil.copytree(run_of_a_model_with_tools / "adapter", adapter)
    shutil.copyfile(base / "chat_template.jinja", adapter / "chat_template.jinja")

    def stopped(*_: Any) -> Any:
        merges.append("merge")
        raise LoratuneError("stopped", Exit.MODEL)

    monkeypatch.setattr("loratune.delivery.export.export.carry_out", stopped)
    arguments = ["--adapter", adapter, "--base-model", base, "--format", "ollama", "--output", tmp_path / "out"]
    told = cli("export", *arguments).stderr
    _, _, after = " ".join(told.split()).partition("Ollama will say that the model does not support tools")
    assert after.endswith("error: stopped")
    assert merges == ["merge"]
    assert f"llama-server --jinja -m {tmp_path}/out/" in told


@pytest.mark.parametrize(
    ("template", "parser"),
    [
        ("qwen2_5", None),
        ("qwen3", "qwen3"),
        ("qwen3_instruct_2507", None),
        ("qwen3_5_think", "deepseek_r1"),
        ("llama3_1", None),
    ],
)
def test_reasoning_is_found_in_what_the_template_writes(template: str, parser: str | None) -> None:
    text = (files("trl") / "chat_templates" / f"{template}.jinja").read_text("utf-8")
    assert vllm_reasoning_parser(load_tokenizer(TINY_QWEN), text, ReasoningForm()) == parser


def test_a_template_that_closes_the_block_by_itself_needs_no_parser() -> None:
    text = (files("trl") / "chat_templates" / "qwen3.jinja").read_text("utf-8")
    closed = "{%- set enable_thinking = false %}" + text
    assert vllm_reasoning_parser(load_tokenizer(TINY_QWEN), closed, ReasoningForm()) is None


def test_a_plain_adapter_is_served_with_the_parsers_of_its_base(
    run_of_a_model_with_tools: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, folder = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(run_of_a_model_with_tools.parent / "base", base)
    template = files("trl") / "chat_templates" / "qwen3.jinja"
    (base / "chat_template.jinja").write_text(template.read_text("utf-8"), encoding="utf-8")
    folder.mkdir()
    source = AdapterSource(folder, None, None, None)
    assert find_parsers(folder, str(base), source) == Parsers("hermes", "qwen3")
    assert Parsers("hermes", "qwen3").flags[-2:] == ["--reasoning-parser", "qwen3"]
    assert find_parsers(folder, "org/name", source) == Parsers()
    assert "no chat template of its own" in " ".join(capsys.readouterr().err.split())
