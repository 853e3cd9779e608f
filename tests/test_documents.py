"""What commands print for programs: one document each, with a schema that is true, also where they fail."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import typer
from documents import faults, validator
from jsonschema import Draft202012Validator
from processes import comes_true
from rich.console import Console
from typer.testing import CliRunner, Result

from loratune import console
from loratune.cli.agents_md import agents_text
from loratune.cli.app import app
from loratune.cli.commands import command_lines, command_module
from loratune.cli.failures import problems_of
from loratune.cli.schema import documents
from loratune.commands import Command
from loratune.errors import Exit, Interrupted, LoratuneError, Problem

Cli = Callable[..., Result]
WITHOUT = {("mcp",)}
"""Whose stdout is a protocol."""
TINY = ("--model.base", "tiny-qwen", "--model.dtype", "float32")


def told(result: Result) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(result.stdout)
    return values


# --- every command ---


@pytest.mark.parametrize("line", command_lines(), ids=" ".join)
def test_every_command_has_json_and_a_document_of_its_name(line: tuple[str, ...]) -> None:
    command: Any = typer.main.get_command(app)
    for word in line:
        command = command.get_command(typer.Context(command), word)
    has_json = any("--json" in parameter.opts for parameter in command.params)
    document = getattr(command_module("_".join(line)), "DOCUMENT", None)
    assert has_json == (document is not None) == (line not in WITHOUT)
    assert document is None or document.name == "-".join(line)


@pytest.mark.parametrize("name", documents())
def test_schemas_are_strict_and_describe_what_they_hold(name: str) -> None:
    def objects(schema: Any) -> list[dict[str, Any]]:
        inner = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else []
        own = [schema] if isinstance(schema, dict) and isinstance(schema.get("properties"), dict) else []
        return [*own, *(found for one in inner for found in objects(one))]

    schema = documents()[name].json_schema()
    Draft202012Validator.check_schema(schema)
    found = objects(schema)
    assert found
    assert all(one["additionalProperties"] is False for one in found)
    assert all(one["description"] for one in found if "from" not in one["properties"])
    assert "x-beside" not in json.dumps(schema)


@pytest.mark.parametrize(
    "line",
    [
        ("sft", "--config", "quickstart", "--show"),
        ("launch", "slurm", "--config", "qwen7b"),
        ("launch", "k8s", "--config", "qwen7b", "--image", "registry/name:1"),
        ("launch", "sky", "--config", "qwen7b", "--bucket", "b", "--install", "loratune", "--gpus", "0"),
        ("data", "check", "--config", "quickstart"),
        ("data", "preview", "--config", "quickstart", "--rows", "2"),
        ("data", "preview", "--config", "quickstart", "--rows", "2", "--packed"),
        ("schema",),
        ("schema", "recipe"),
        ("schema", "data check"),
    ],
    ids=" ".join,
)
def test_a_document_is_all_that_is_printed(cli: Cli, line: tuple[str, ...]) -> None:
    result = cli(*line, "--json")
    assert result.exit_code == 0, result.stderr
    if line[0] != "schema":
        assert told(result)["schema"] == f"loratune/{'-'.join(line[:2] if line[0] != 'sft' else line[:1])}/1"


def test_a_run_and_what_is_made_of_it_print_their_documents(cli: Cli, short_run: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "How much is 1+1?", "output": "2"}\n')
    made, served = tmp_path / "merged", tmp_path / "served"
    for line in (
        ("runs", "show", short_run),
        ("merge", "--adapter", short_run, "--output", made),
        ("verify", made),
        ("verify", short_run),
        ("export", "--adapter", short_run, "--format", "vllm", "--output", served),
        ("verify", served),
        ("infer", "--adapter", short_run, "--prompt", "Hi", "--max-new-tokens", "2"),
        ("infer", "--adapter", short_run, "-i", rows, "-o", tmp_path / "a.jsonl", "--max-new-tokens", "2", "--metrics"),
    ):
        result = cli(*line, "--json")  # which checks the document
        assert result.exit_code == 0, result.stderr


def test_a_planted_key_and_a_missing_one_are_caught_anywhere_in_a_document(cli: Cli, short_run: Path) -> None:
    document = told(cli("verify", short_run, "--json"))
    without = [{key: value for key, value in document.items() if key != name} for name in document if name != "schema"]
    for planted in (document | {"extra": 1}, document | {"files": "many"}, *without):
        assert faults(planted)
    report = json.loads((short_run / "report.json").read_text())
    report = {"schema": documents()["sft"].schema} | report
    assert faults(report) == []
    deeper = deepcopy(report)
    deeper["health"]["answers"]["told"][0]["extra"] = 1
    assert faults(deeper)
    del report["health"]["answers"]["changed"]
    assert faults(report)


def test_values_written_beside_others_have_no_key_of_their_own() -> None:
    merged = documents()["merge"].json_schema()
    assert {"read_back", "logits", "kind", "schema"} <= set(merged["properties"])
    assert {"models", "proved"}.isdisjoint(merged["properties"])
    assert set(merged["required"]) | {"files", "sha256"} == set(merged["properties"])


def test_a_server_prints_its_address_once(start: Callable[..., Any], random_qwen: Path) -> None:
    program = start("serve", "--model", random_qwen, "--port", "0", "--json")
    assert comes_true(lambda: program.has_ended() or program.stdout.endswith("}\n")), program.stderr
    program.send(signal.SIGTERM)
    program.exit_code()
    document = json.loads(program.stdout)
    assert faults(document) == []
    assert document["models"] == ["random-qwen"]
    assert f"api_key={document['api_key']}" in program.stderr


# --- failures ---


def test_a_recipe_s_problems_have_file_line_key_and_remedy(cli: Cli, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model:\n  base: tiny-qwen\n  qantization: nf4\ntraining:\n  epochs: -3\ndata: {train: a.json}\n")
    result = cli("sft", "--config", recipe, "--lora.rank", "x", "--json")
    problems = told(result)["problems"]
    assert [(one["file"], one["line"], one["key"]) for one in problems] == [
        (None, None, "--lora.rank"), (str(recipe), 3, "model.qantization"), (str(recipe), 5, "training.epochs"),
    ]  # fmt: skip
    assert problems[1]["remedy"] == "did you mean model.quantization?"
    assert problems[2]["remedy"] == "must be greater than 0"
    assert told(result)["exit_code"] == Exit.USAGE
    assert "error: " in result.stderr


@pytest.mark.parametrize(
    ("line", "key"),
    [
        (("nosuch",), None),
        (("merge", "--nosuch"), "--nosuch"),
        (("data", "nosuch"), None),
        (("--nosuch",), "--nosuch"),
        (("data", "preview", "--rows", "0"), "--rows"),
        (("launch", "slurm", "--config", "qwen7b", "--partition", "a b"), "--partition"),
    ],
)
def test_a_wrong_command_line_is_a_document_too(cli: Cli, line: tuple[str, ...], key: str | None) -> None:
    result = cli(*line, "--json")
    (problem,) = told(result)["problems"]
    assert (told(result)["exit_code"], problem["key"]) == (Exit.USAGE, key)
    assert problem["remedy"].endswith("--help lists the options and what they take")


def test_rows_with_faults_have_their_places(cli: Cli, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\nnot JSON\n')
    result = cli("data", "check", *TINY, "--data.train", rows, "--json")
    (problem,) = told(result)["problems"]
    assert (told(result)["exit_code"], problem["file"], problem["line"]) == (Exit.DATA, str(rows), 2)
    assert "correct or remove these rows" in problem["remedy"]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("odd"), Exit.BUG, "ValueError: odd"),
        (Interrupted(signal.SIGTERM, "stopped; go on with --resume"), 143, "stopped; go on with --resume"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "/x"), Exit.IO, "/x: Permission denied; --debug shows where"),
        (LoratuneError("a; do b", Exit.MODEL), Exit.MODEL, "a; do b"),
    ],
)
def test_whatever_ends_a_command_is_a_document(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("loratune.cli.runs_show.find_model", fail)
    result = CliRunner().invoke(app, ["runs", "show", "x", "--json"])
    assert (told(result)["exit_code"], result.exit_code) == (code, code)
    assert told(result)["message"].startswith(message)
    assert faults(told(result)) == []
    assert CliRunner().invoke(app, ["runs", "show", "x"]).stdout == ""


def test_the_command_that_goes_on_after_a_signal_can_be_pasted_and_is_in_the_document(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on = Command("go on with", ("loratune", "sft", "--config", "a" * 40, "--resume"))

    def stop(*_: object) -> None:
        raise Interrupted(signal.SIGTERM, "stopped", [go_on])

    monkeypatch.setattr("loratune.cli.runs_show.find_model", stop)
    monkeypatch.setattr(console, "stderr", Console(stderr=True, width=70))
    result = CliRunner().invoke(app, ["runs", "show", "x", "--json"])
    assert (told(result)["message"], told(result)["commands"][0]["line"]) == ("stopped", go_on.line)
    assert result.stderr.splitlines() == [
        "stopped", "  go on with:", f"    loratune sft --config {'a' * 40} \\", "      --resume",
    ]  # fmt: skip


def test_a_failure_after_the_document_does_not_print_another(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, rows_file: Path, tmp_path: Path
) -> None:
    def fail(_: object) -> None:
        raise LoratuneError("2 rows could not be asked", Exit.DATA)

    monkeypatch.setattr("loratune.generation.batch.report.require_all_asked", fail)
    flags = ("--model", "tiny-qwen", "--max-new-tokens", "1", "--output", tmp_path / "a.jsonl")
    result = cli("infer", "--input", rows_file, *flags, "--json")
    assert (result.exit_code, told(result)["rows"]) == (Exit.DATA, 12)


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("rows:\n  a.json:3: no 'output'\n  a.json row 4: empty", [("a.json", 3, None), ("a.json", None, 4)]),
        ("a.json: bad:\n  line 3: x\n  line 5: y\n  … and 2 more", [("a.json", 3, None), ("a.json", 5, None)]),
        ("nothing: as it is", [(None, None, None)]),
        ("missing.json: no such file", [("missing.json", None, None)]),
    ],
)
def test_places_are_read_from_messages(
    text: str, places: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.json").touch()
    assert [(one.file, one.line, one.row) for one in problems_of(text)] == places


@pytest.mark.parametrize(
    ("message", "problems"),
    [
        ("--weights: two are needed", (Problem("two are needed", key="--weights"),)),
        ("it is full; free some", (Problem("it is full; free some", remedy="free some"),)),
        ("out of memory: 3\nfree some", (Problem("out of memory: 3\nfree some", remedy="free some"),)),
        (
            "odd:\n  a; b\n  c\ncorrect them",
            (Problem("a; b", remedy="correct them"), Problem("c", remedy="correct them")),
        ),
    ],
)
def test_remedies_are_read_from_messages(message: str, problems: tuple[Problem, ...]) -> None:
    assert problems_of(message) == problems


def test_a_schema_that_is_not_there_is_told_with_those_that_are(cli: Cli) -> None:
    result = cli("schema", "nosuch")
    assert result.exit_code == Exit.USAGE
    assert "recipe, sweep-recipe, sft" in result.stderr
    assert validator("error").is_valid(told(cli("schema", "nosuch", "--json")))


# --- AGENTS.md ---


def test_agents_md_is_written_once_and_names_every_command_and_exit_code(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("agents-md", "--json")
    text = Path("AGENTS.md").read_text(encoding="utf-8")
    assert told(result) == {"schema": "loratune/agents-md/1", "file": "AGENTS.md", "text": text}
    assert [line for line in command_lines() if f"| `loratune {' '.join(line)}` |" not in text] == []
    assert [code for code in Exit if f"\n| {int(code)} | " not in text] == []

    Path("AGENTS.md").write_text("mine")
    refused = cli("agents-md", "--json")
    assert (refused.exit_code, Path("AGENTS.md").read_text()) == (Exit.USAGE, "mine")
    assert "AGENTS.md exists already" in refused.stderr
    assert cli("agents-md", "--overwrite").exit_code == 0
    assert Path("AGENTS.md").read_text(encoding="utf-8") == text


def test_what_agents_md_tells_to_run_is_there() -> None:
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", agents_text(), re.DOTALL))
    lines = [line.partition("#")[0].split()[1:] for line in blocks.splitlines()]
    assert len(lines) == 5
    for words in lines:
        command: Any = typer.main.get_command(app)
        while hasattr(command, "list_commands"):
            command = command.get_command(typer.Context(command), words.pop(0))
        known = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known
