"""Names of settings: of earlier versions, and of other tools."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig
from trl import SFTConfig

from loratune.errors import Exit, LoratuneError
from loratune.recipe import names
from loratune.recipe.loading import load_recipe, load_written_recipe
from loratune.recipe.names import RENAMED, with_current_names
from loratune.recipe.not_offered import NOT_OFFERED
from loratune.recipe.sections import flat_settings, iterate_settings
from loratune.recipe.suggestions import KNOWN_ELSEWHERE, WITHOUT_SETTING, suggestion

SETTINGS = dict(iterate_settings())
OLD_RUNS = Path(__file__).parent / "old_runs"
VALUES = {
    "model.attention": "sdpa",
    "lora.targets": ["q_proj"],
    "data.train_on": "last",
    "data.too_long": "refuse",
    "data.levels": {"short": "ignore"},
    "data.clean": ["duplicates"],
    "prompt.thinking": True,
    "training.steps": 7,
    "training.max_gradient_norm": 0.5,
    "training.tokens_per_batch": 512,
}


def written(folder: Path, values: dict[str, Any]) -> str:
    nested: dict[str, Any] = {"model": {"base": "x"}, "data": {"train": ["a.json"]}}
    for dotted, value in values.items():
        section, _, name = dotted.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(nested), encoding="utf-8")
    return str(path)


def told(folder: Path, name: str, value: Any = 1) -> str:
    with pytest.raises(LoratuneError) as failure:
        load_recipe(written(folder, {name: value}), {})
    return str(failure.value)


def test_every_renamed_setting_leads_to_one_that_exists_and_no_old_name_does() -> None:
    assert RENAMED.keys() == VALUES.keys()
    assert set(RENAMED.values()) <= SETTINGS.keys()
    assert not RENAMED.keys() & SETTINGS.keys()


@pytest.mark.parametrize("old", RENAMED)
def test_a_recipe_with_an_old_name_is_the_one_with_the_new_name_and_a_line_says_so(
    tmp_path: Path, old: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = load_recipe(written(tmp_path, {old: VALUES[old]}), {})
    said = "".join(capsys.readouterr())
    assert found == load_recipe(written(tmp_path, {RENAMED[old]: VALUES[old]}), {})
    assert f"{old} is now {RENAMED[old]}" in " ".join(said.split())
    assert not "".join(capsys.readouterr())  # under its new name nothing is said


@pytest.mark.parametrize("old", RENAMED)
def test_the_problem_of_an_old_name_has_its_line_in_the_file(tmp_path: Path, old: str) -> None:
    message = told(tmp_path, old, {"a": {}} if old != "data.levels" else 5)
    lines = Path(tmp_path / "r.yaml").read_text(encoding="utf-8").splitlines()
    line = next(number for number, text in enumerate(lines, 1) if text.strip().startswith(old.rpartition(".")[2] + ":"))
    assert f"line {line}: {RENAMED[old]}" in message


@pytest.mark.parametrize("old", RENAMED)
def test_a_setting_under_both_names_is_refused(tmp_path: Path, old: str) -> None:
    both = {old: VALUES[old], RENAMED[old]: VALUES[old]}
    expected = f"{old} is now called {RENAMED[old]}, and both are given"
    with pytest.raises(LoratuneError, match=expected):
        load_recipe(written(tmp_path, both), {})
    with pytest.raises(LoratuneError, match=expected.replace(f"called {RENAMED[old]}", f"called --{RENAMED[old]}")):
        load_recipe(written(tmp_path, {}), both)


def test_flags_have_their_old_names_too(
    cli: Any, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model.base", "tiny-qwen", "--data.train", rows_file, "--output", tmp_path / "run"]
    old = ["--data.clean", "duplicates", "--no-prompt.thinking", "--training.steps", "3", "--lora.targets", "q_proj"]
    new = ["--data.remove", "duplicates", "--no-prompt.enable_thinking", "--training.max_steps", "3"]
    first, second = (
        cli("data", "check", *flags, *given, "--json") for given in (old, [*new, "--lora.target_modules", "q_proj"])
    )
    assert (first.exit_code, json.loads(first.stdout)) == (second.exit_code, json.loads(second.stdout))
    assert "--training.steps is now --training.max_steps" in " ".join(first.stderr.split())
    assert "is now" not in second.stderr
    page = cli("sft", "--help").stdout
    assert "training.max_steps" in page
    assert "training.steps" not in page.replace("training.max_steps", "")


def test_a_recipe_that_loratune_wrote_may_have_old_names_and_settings_that_were_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(names.DROPPED, "training.label_smoothing", "it made answers worse")
    path = written(tmp_path, {"training.steps": 7, "training.label_smoothing": 0.1})
    assert load_written_recipe(Path(path)).training.max_steps == 7
    assert not "".join(capsys.readouterr())
    assert load_recipe(path, {}) == load_recipe(written(tmp_path, {"training.max_steps": 7}), {})
    assert "training.label_smoothing is ignored: it made answers worse" in " ".join(capsys.readouterr().err.split())
    assert with_current_names({"training.label_smoothing": 0.1, "data.levels.short": "warn", "seed": 1}) == {
        "data.severity.short": "warn",
        "seed": 1,
    }


@pytest.mark.parametrize(
    ("recipe", "flags", "rows"),
    [
        ({"training.batch_size": 1, "training.gradient_accumulation": 16}, {}, 16),
        ({"training.gradient_accumulation": 3}, {}, 12),  # the batch size was 4 by default
        ({"training.batch_size": 3}, {}, 3),
        ({"training.batch_size": 3, "training.gradient_accumulation": 2}, {"training.batch_size": "5"}, 10),
        ({"training.batch_size": 3}, {"training.gradient_accumulation": "4"}, 12),
        ({}, {"training.gradient_accumulation": "4", "training.batch_size": "2"}, 8),
    ],
    ids=str,
)
def test_gradient_accumulation_becomes_part_of_the_batch_size(
    tmp_path: Path,
    recipe: dict[str, Any],
    flags: dict[str, str],
    rows: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = written(tmp_path, recipe)
    assert load_recipe(path, flags).training.batch_size == rows
    said = " ".join(capsys.readouterr().err.split())
    assert (f"is read as {rows}" in said) == ("training.gradient_accumulation" in recipe | flags)
    assert not flags or load_written_recipe(Path(path))


@pytest.mark.parametrize("value", [0, -1, 1.5, "two", None, True])
def test_an_accumulation_that_is_no_number_is_a_problem_of_the_recipe(tmp_path: Path, value: Any) -> None:
    with pytest.raises(LoratuneError, match=r"training.gradient_accumulation: .* write that number there") as failure:
        load_recipe(written(tmp_path, {"training.gradient_accumulation": value}), {})
    assert failure.value.exit_code == Exit.USAGE


def test_the_validation_s_own_batch_size_is_ignored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cli: Any
) -> None:
    path = written(tmp_path, {"evaluation.batch_size": 4})
    assert load_recipe(path, {}) == load_recipe(written(tmp_path, {}), {})
    assert "evaluation.batch_size is ignored: a validation pass" in " ".join(capsys.readouterr().err.split())
    assert "evaluation.batch_size" not in cli("sft", "--help").stdout


def test_a_recipe_of_an_earlier_version_says_what_it_said(tmp_path: Path) -> None:
    """Compared value by value with the file as PyYAML reads it."""
    for run in ("finished", "interrupted"):
        path = OLD_RUNS / run / "recipe.yaml"
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        flat = {
            f"{section}.{name}" if name else section: value
            for section, values in raw.items()
            for name, value in (values.items() if isinstance(values, dict) else [("", values)])
        }
        found = flat_settings(load_written_recipe(path))
        rows = flat.pop("training.batch_size") * flat.pop("training.gradient_accumulation")
        assert found["training.batch_size"] == rows
        assert flat.pop("evaluation.batch_size") is None
        for name, value in flat.items():
            if value == {}:  # no keys
                assert not any(known.startswith(f"{name}.") for known in found), name
            elif name != "data.train":  # made a path
                assert found[RENAMED.get(name, name)] == value, name


@pytest.mark.parametrize("name", KNOWN_ELSEWHERE)
def test_a_name_of_another_tool_is_answered_with_loratunes(tmp_path: Path, name: str) -> None:
    elsewhere = KNOWN_ELSEWHERE[name]
    setting = elsewhere.split()[0].rstrip(":")
    is_setting = not elsewhere.startswith(("the command", "the flag", "the environment"))
    assert not is_setting or setting in SETTINGS
    assert name not in {known.rpartition(".")[2] for known in SETTINGS}  # that one is found by itself
    for place in (name, f"training.{name}", f"model.{name}"):
        message = told(tmp_path, place)
        assert f"{place}: no such setting; in loratune this is {elsewhere}" in message


def test_a_name_of_another_tool_is_in_one_table() -> None:
    tables = (KNOWN_ELSEWHERE, WITHOUT_SETTING, NOT_OFFERED)
    assert sum(map(len, tables)) == len({name for table in tables for name in table})


def test_no_name_of_trl_or_peft_leads_to_a_setting_that_is_another_thing() -> None:
    """A guess by similarity is for typing mistakes; a name that these libraries have is no mistake."""
    similar = {
        "activation_checkpointing": "training.gradient_checkpointing",
        "gradient_checkpointing_kwargs": "training.gradient_checkpointing",
        "truncation_mode": "data.truncation_strategy",
    }
    own = {known.rpartition(".")[2] for known in SETTINGS}
    for name in {field.name for kind in (SFTConfig, LoraConfig) for field in fields(kind)} - own:
        found = suggestion(name, SETTINGS)
        if not any(name in table for table in (KNOWN_ELSEWHERE, WITHOUT_SETTING, NOT_OFFERED)):
            assert found in ("", f"; did you mean {similar.get(name)}?"), (name, found)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("learning_rat", "training.learning_rate"),
        ("training.learning_rat", "training.learning_rate"),
        ("lora.ranks", "lora.rank"),
        ("evaluation.every_step", "evaluation.every_steps"),
        ("checkpoints.every_step", "checkpoints.every_steps"),
        ("training.target", "lora.target_modules"),
        ("model.atention", "model.attn_implementation"),
    ],
)
def test_a_typing_mistake_leads_to_the_setting_that_was_meant(tmp_path: Path, name: str, expected: str) -> None:
    assert f"did you mean {expected}?" in told(tmp_path, name)


def test_a_section_is_proposed_for_a_section_alone(tmp_path: Path) -> None:
    assert "did you mean training?" in told(tmp_path, "trainin", {"epochs": 3})
    assert "did you mean training?" not in told(tmp_path, "trainin", 3)
