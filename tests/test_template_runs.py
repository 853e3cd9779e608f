"""Runs on templates that write dates, ignore the generation prompt or come in a list, from training to delivery."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROWS
from test_chat_template import CHATML, DATED, WITH_TOOLS, WITHOUT_PROMPT, model_folder
from test_run_faults import reseal
from transformers import AutoTokenizer
from typer.testing import Result

from loratune.engine.loading import open_voices
from loratune.errors import Exit
from loratune.recipe.loading import load_recipe
from loratune.runs.checkpoint import open_checkpoint
from loratune.runs.folder import sealed
from loratune.runs.opening import open_adapter
from loratune.training import gate

CLI = Callable[..., Result]
DAY, NEXT_DAY = "2026-02-28", "2026-03-01"
QUESTION = ROWS[0]["instruction"]
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make it a certain day."""

    def set_day(day: str) -> None:
        class Date(datetime.date):
            @classmethod
            def today(cls) -> datetime.date:
                return datetime.date.fromisoformat(day)

        monkeypatch.setattr(gate, "date", Date)

    return set_day


@pytest.fixture
def sft(cli: CLI, random_qwen: Path, tmp_path: Path, rows_file: Path) -> Callable[..., Result]:
    """Two steps on the random model with another template."""

    def run(template: Any, *flags: Any, named: dict[str, str] | None = None) -> Result:
        if not (tmp_path / "base").exists():
            model_folder(tmp_path / "base", template, random_qwen, named)
        settings = {"--training.max_steps": 2, "--training.batch_size": 4, "--data.validation": 0.2}
        return cli(
            "sft", "--model.base", tmp_path / "base", "--model.dtype", "float32", "--data.train", rows_file,
            "--output", tmp_path / "run", *(part for pair in settings.items() for part in pair), *flags,
        )  # fmt: skip

    return run


def words(text: str) -> str:
    return " ".join(text.split())


def prompts(run: Path) -> list[str]:
    """The rows that a run has set aside, as text."""
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    return [tokenizer.decode(row["input_ids"]) for row in json.loads((run / "probe.json").read_text())["rows"]]


def written_by_an_earlier_version(run: Path) -> None:
    """Take out of a run what earlier versions did not note."""
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["template"] = {name: manifest["template"][name] for name in ("sha256", "end_token_id")}
    lines = (run / "recipe.yaml").read_text().splitlines(keepends=True)
    (run / "recipe.yaml").write_text("".join(line for line in lines if line.split(":")[0].strip() not in NEW_SETTINGS))
    assert load_recipe(str(run / "recipe.yaml"), {}).prompt.date is None
    manifest["files"]["recipe.yaml"] = sealed(run / "recipe.yaml")
    del manifest["sha256"], manifest["base"]["tensors"], manifest["base"]["tensors_sha256"]
    (run / "manifest.json").write_text(json.dumps(manifest))


NEW_SETTINGS = ("date", "generation_prompt")


# --- dates ---


def test_a_run_goes_on_with_the_day_that_it_began_on(
    sft: Callable[..., Result], on: Callable[[str], None], tmp_path: Path
) -> None:
    on(DAY)
    begun = sft(DATED)
    assert begun.exit_code == 0, begun.stderr
    assert f"writes the date into prompts: that of {DAY}" in words(begun.stderr)
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml"), {}).prompt.date == DAY
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["template"]["date"] == DAY
    on(NEXT_DAY)
    resumed = sft(DATED, "--training.max_steps", "4", "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert f"that of {DAY}" in words(resumed.stderr)
    assert all("Today is 28 Feb 2026<" in text for text in prompts(tmp_path / "run"))
    again = sft(DATED, "--training.max_steps", "6", "--resume", "--prompt.date", NEXT_DAY)
    assert again.exit_code == Exit.USAGE
    assert f"date in prompts: {DAY} → {NEXT_DAY}" in words(again.stderr)
    changed = sft(DATED, "--training.max_steps", "6", "--resume", "--prompt.date", NEXT_DAY, "--allow-changes")
    assert changed.exit_code == 0, changed.stderr
    assert all("Today is 01 Mar 2026<" in text for text in prompts(tmp_path / "run"))


def test_rows_of_another_day_are_never_taken_for_today_s(
    cli: CLI, on: Callable[[str], None], tmp_path: Path, rows_file: Path
) -> None:
    base = model_folder(tmp_path / "base", DATED)
    told = []
    for day, flags in ((DAY, []), (NEXT_DAY, []), (NEXT_DAY, ["--prompt.date", DAY])):
        on(day)
        shown = cli("data", "preview", "--model.base", base, "--data.train", rows_file, "--json", *flags)
        told.append(json.loads(shown.stdout)["sequences"][0]["text"].partition("Today is ")[2][:11])
        assert f"that of {flags[1] if flags else day}" in words(shown.stderr)
    assert told == ["28 Feb 2026", "01 Mar 2026", "28 Feb 2026"]
    undated = model_folder(tmp_path / "undated", CHATML)
    flags = ["data", "check", "--model.base", undated, "--data.train", rows_file, "--prompt.date", DAY]
    assert "prompt.date has no effect" in words(cli(*flags).stderr)


def test_a_checkpoint_that_knows_no_day_goes_on_with_that_of_the_run_s_start(
    sft: Callable[..., Result], tmp_path: Path
) -> None:
    assert sft(DATED, "--prompt.date", DAY).exit_code == 0
    run = tmp_path / "run"
    written_by_an_earlier_version(run)
    created = json.loads((run / "manifest.json").read_text())["created"][:10]
    for checkpoint in (run / "checkpoints").iterdir():
        identity = open_checkpoint(checkpoint).identity
        del identity["rest"]["date in prompts"]
        reseal(checkpoint, identity=identity)
    resumed = sft(DATED, "--training.max_steps", "4", "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert f"the date of the run's start, {created}, is used" in words(resumed.stderr)
    assert load_recipe(str(run / "recipe.yaml"), {}).prompt.date == created


def test_asking_takes_the_current_date_and_says_so_once(cli: CLI, sft: Callable[..., Result], tmp_path: Path) -> None:
    assert sft(DATED, "--prompt.date", DAY).exit_code == 0
    run = tmp_path / "run"
    opened = open_voices([("run", run)], None)
    voices = opened.voices
    (told,) = [text for text in opened.warnings if "date" in text]
    assert told.endswith(f"in training it was {DAY}")
    today = datetime.date.today()
    for voice in voices.values():
        text = voice.encoder.tokenizer.decode(voice.encoder.prompt_ids([{"role": "user", "content": "a"}]))
        days = (today, datetime.date.today())  # should midnight have come in between
        assert any(f"Today is {day:%d %b %Y}<" in text for day in days)
    answers = tmp_path / "answers.jsonl"
    asked = ["infer", "--adapter", run, "--input", tmp_path / "rows.json", "--output", answers, "--max-new-tokens", 4]
    assert cli(*asked).exit_code == 0
    about = json.loads(answers.with_name("answers.jsonl.report.json").read_text())["about"]
    assert about["date"] in [str(day) for day in days]
    assert about["prompt"].keys().isdisjoint(NEW_SETTINGS)
    again = cli(*asked)
    assert f"is complete: {len(ROWS)} rows" in words(again.stderr)


def test_merged_and_exported_models_say_what_becomes_of_the_date(
    cli: CLI, sft: Callable[..., Result], tmp_path: Path
) -> None:
    assert sft(DATED, "--prompt.date", DAY).exit_code == 0
    run = tmp_path / "run"
    merged = cli("merge", "--adapter", run, "--output", tmp_path / "merged")
    assert merged.exit_code == 0, merged.stderr
    assert f"transformers and vLLM write the current one; in training it was {DAY}" in words(merged.stderr)
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == DATED
    exports = {"gguf": "llama.cpp writes the current one", "vllm": "vLLM writes the current one"}
    for form, told in exports.items():
        done = cli("export", "--adapter", run, "--format", form, "--output", tmp_path / form)
        assert done.exit_code == 0, done.stderr
        assert f"{told}; in training it was {DAY}" in words(done.stderr)
    for name, source in (("ollama", ["--adapter", run]), ("ollama-merged", ["--model", tmp_path / "merged"])):
        done = cli("export", *source, "--format", "ollama", "--output", tmp_path / name)
        assert done.exit_code == 0, done.stderr
        assert f"Ollama's names {DAY}, whatever the day" in words(done.stderr)
        assert "current one" not in words(done.stderr)
        assert "Today is 28 Feb 2026" in (tmp_path / name / "Modelfile").read_text()


# --- generation prompts ---


def test_a_completed_prompt_is_told_by_every_command_and_stays_with_the_model(
    cli: CLI, sft: Callable[..., Result], tmp_path: Path, rows_file: Path
) -> None:
    trained = sft(WITHOUT_PROMPT)
    assert trained.exit_code == 0, trained.stderr
    run, rows = tmp_path / "run", ["--model.base", tmp_path / "base", "--data.train", rows_file]
    commands = [
        cli("data", "check", *rows),
        cli("data", "preview", *rows),
        trained,
        cli("infer", "--adapter", run, "--prompt", "a", "--max-new-tokens", 2),
        cli("infer", "--model", tmp_path / "base", "--prompt", "a", "--max-new-tokens", 2),
    ]
    for result in commands:
        assert result.exit_code == 0, result.stderr
        assert words(result.stderr).count("ignores add_generation_prompt: prompts are completed") == 1
    header = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\nIt is 0.<|im_end|>"
    assert header in json.loads(cli("data", "preview", *rows, "--json").stdout)["sequences"][0]["text"]
    assert cli("merge", "--adapter", run, "--output", tmp_path / "merged").exit_code == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert header.startswith(rendered)
    assert rendered.endswith("assistant\n")
    asked = cli("infer", "--model", tmp_path / "merged", "--prompt", "a", "--max-new-tokens", 2)
    assert "add_generation_prompt" not in asked.stderr
    assert cli("export", "--adapter", run, "--format", "vllm", "--output", tmp_path / "vllm").exit_code == 0
    assert (tmp_path / "vllm" / "chat_template.jinja").read_text() == (
        tmp_path / "merged" / "chat_template.jinja"
    ).read_text()


def test_a_run_of_an_earlier_version_is_asked_resumed_and_merged_as_it_was_trained(
    cli: CLI, sft: Callable[..., Result], tmp_path: Path
) -> None:
    assert sft(WITHOUT_PROMPT, "--prompt.generation_prompt", "template").exit_code == 0
    run = tmp_path / "run"
    written_by_an_earlier_version(run)
    assert open_adapter(run).prompt.generation_prompt == "template"
    ids = open_voices([("run", run)], None).voices["run"].encoder.prompt_ids([{"role": "user", "content": "a"}])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert tokenizer.decode(ids) == "<|im_start|>user\na<|im_end|>\n"
    merged = cli("merge", "--adapter", run, "--output", tmp_path / "merged", "--no-logits")
    assert merged.exit_code == 0, merged.stderr
    assert (tmp_path / "merged" / "chat_template.jinja").read_text() == WITHOUT_PROMPT
    (voice,) = open_voices([], str(tmp_path / "merged")).voices.values()
    assert voice.encoder.prompt_ids([{"role": "user", "content": "a"}]) == ids
    resumed = sft(WITHOUT_PROMPT, "--training.max_steps", "4", "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert not any("assistant" in text for text in prompts(run))
    anew = sft(WITHOUT_PROMPT, "--training.max_steps", "6", "--resume", "--prompt.generation_prompt", "auto")
    assert anew.exit_code == Exit.USAGE
    assert "template: " in words(anew.stderr)


# --- named templates ---


@pytest.mark.parametrize("is_listed", [True, False])
def test_a_run_on_named_templates_is_asked_merged_and_exported(
    cli: CLI, sft: Callable[..., Result], tmp_path: Path, is_listed: bool
) -> None:
    named = {"tool_use": WITH_TOOLS}
    trained = sft({"default": CHATML, **named}) if is_listed else sft(CHATML, named=named)
    assert trained.exit_code == 0, trained.stderr
    run = tmp_path / "run"
    files = json.loads((run / "manifest.json").read_text())["files"]
    assert ("adapter/additional_chat_templates/tool_use.jinja" in files) is not is_listed
    asked = cli("infer", "--adapter", run, "--prompt", "a", "--max-new-tokens", 2)
    assert asked.exit_code == 0, asked.stderr
    for output, command in (("merged", ["merge", "--no-logits"]), ("adapter", ["export", "--format", "adapter"])):
        done = cli(*command, "--adapter", run, "--output", tmp_path / output)
        assert done.exit_code == 0, done.stderr
    for folder in ("merged", "adapter"):
        assert AutoTokenizer.from_pretrained(tmp_path / folder).chat_template == {"default": CHATML, **named}
    if not is_listed:
        (run / "adapter" / "additional_chat_templates" / "tool_use.jinja").write_text("x")
        assert "tool_use.jinja" in cli("infer", "--adapter", run, "--prompt", "a").stderr
