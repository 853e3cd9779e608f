"""Recipe and flags → settings: types, bounds, precedence, messages, advice; and what the shipped recipes hold."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import ValidationError
from typer.testing import Result

from loratune.errors import Exit, LoratuneError
from loratune.recipe.advice import advise
from loratune.recipe.json_schema import recipe_schema, sweep_schema
from loratune.recipe.loading import dump_recipe, find_recipe, load_recipe, shipped_recipes, shipped_sweeps
from loratune.recipe.method_sections import TargetGroup
from loratune.recipe.names import DROPPED, RENAMED
from loratune.recipe.section import listed
from loratune.recipe.sections import TEMPLATE_ARGUMENTS, Recipe, iterate_settings
from loratune.recipe.yaml_reader import read_yaml

PACKAGE = Path(__file__).resolve().parent.parent / "loratune"
SETTINGS = dict(iterate_settings())
MINIMAL = "model: {base: x}\ndata: {train: [rows.json]}\n"
SHIPPED = shipped_recipes()
SCHEMA = Draft202012Validator(recipe_schema())


@pytest.fixture
def recipe_file(tmp_path: Path) -> Any:
    """Write a recipe; returns its path as text."""

    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def refusal(config: str | None, flags: dict[str, Any] | None = None) -> str:
    """The message with which a recipe is refused as wrong usage."""
    with pytest.raises(LoratuneError) as caught:
        load_recipe(config, flags or {})
    assert caught.value.exit_code == Exit.USAGE
    if config and not flags and "the recipe has" in str(caught.value):
        assert_schema_refuses(Path(config), str(caught.value))
    return str(caught.value)


INEXPRESSIBLE = (
    *("got 8.0", "got 10.0", "must be a finite number", "got '9-3'"),
    *("must be shorter than", "needs model.quantization none", "would shrink", "not available for experts"),
)
"""Parts of messages about what the schema has no words for: equal numbers of other types, and pairs of settings."""


def assert_schema_refuses(recipe: Path, message: str) -> None:
    """What is refused is refused by editors too, as far as a schema can; YAML itself is no matter of schemas."""
    document = read_yaml(recipe.read_text(encoding="utf-8"))
    if not document.problems and not any(part in message for part in INEXPRESSIBLE):
        assert not SCHEMA.is_valid(document.values), message


def value_of(recipe: Recipe, dotted: str) -> Any:
    value: Any = recipe
    for name in dotted.split("."):
        value = getattr(value, name)
    return value


def with_setting(dotted: str, text: str) -> str:
    """A recipe on whose third line one setting stands."""
    section, _, name = dotted.rpartition(".")
    if section == "data":  # which the minimal recipe has already
        return MINIMAL.replace("data: {", f"\ndata: {{{name}: {text}, ")
    return MINIMAL + (f"{section}: {{{name}: {text}}}\n" if section else f"{name}: {text}\n")


def test_a_minimal_recipe_has_the_declared_defaults(recipe_file: Any) -> None:
    recipe = load_recipe(recipe_file(MINIMAL), {})
    for dotted, field in SETTINGS.items():
        if not field.is_required():
            assert value_of(recipe, dotted) == field.default, dotted


def test_five_mistakes_give_one_message_that_names_all_five_with_their_lines(recipe_file: Any) -> None:
    text = (
        "model:\n  base: x\n  dtyp: auto\ndata: {train: [a.json]}\nlora:\n  rank: 0\n"
        "training:\n  epochs: three\n  epochs: 4\n  scheduler: cosign\n"
    )
    config = recipe_file(text)
    assert refusal(config).splitlines() == [
        f"{config}: the recipe has 5 problems:",
        "  line 3: model.dtyp: no such setting; did you mean model.dtype?",
        "  line 6: lora.rank: must be greater than or equal to 1; got 0",
        "  line 8: training.epochs: must be a valid number; got 'three'",
        "  line 9: training.epochs is already given on line 8",
        "  line 10: training.scheduler: expected 'cosine', 'linear' or 'constant'; got 'cosign'",
    ]


def test_the_headline_says_whether_the_file_or_the_flags_are_wrong(recipe_file: Any) -> None:
    given = {"model.base": "tiny-qwen", "data.train": ["a.json"]}
    config, wrong = recipe_file("model: {base: x, dtyp: y}\ndata: {train: [a.json]}\n"), {"lora.rank": "0"}
    rank = "--lora.rank: must be greater than or equal to 1; got 0"
    assert refusal("quickstart", wrong) == refusal(None, given | wrong) == rank
    assert refusal("quickstart", wrong | {"seed": "x"}).splitlines()[:2] == [
        "the settings have 2 problems:",
        f"  {rank}",
    ]
    assert refusal(config, wrong).startswith(
        f"{config}, with the settings that override it, has 2 problems:\n  {rank}\n"
    )
    crossed = {"method": "freeze", "lora.rank": "8"}
    assert refusal(None, given | crossed).startswith("the settings have a problem:\n  ")


def test_without_a_recipe_and_what_it_must_hold_a_line_that_trains_is_told(cli: Callable[..., Result]) -> None:
    error = json.loads(cli("sft", "--json", "--data.train", "a.json").stdout)
    assert error["message"].startswith("no recipe is given, and the flags alone have a problem:\n  model.base: must be")
    assert "give a recipe with --config" in error["message"]
    (command,) = error["commands"]
    assert cli(*shlex.split(command["line"])[1:], "--show").exit_code == 0


@pytest.mark.parametrize(
    ("dotted", "text", "told"),
    [
        ("lora.rank", "8.5", "integer"),
        ("lora.rank", "8.0", "integer"),
        ("lora.rank", "true", "integer"),
        ("lora.rank", "'8'", "integer"),
        ("lora.rank", "null", "integer"),
        ("lora.rank", "[8]", "integer"),
        ("lora.rank", "1e1", "integer"),
        ("training.epochs", "three", "number"),
        ("training.epochs", "true", "number"),
        ("training.learning_rate", "'1e-4'", "number"),
        ("training.learning_rate", "{a: 1}", "number"),
        ("lora.use_dora", "1", "boolean"),
        ("lora.use_dora", "yes", "boolean"),
        ("output", "5", "string"),
        ("output", "null", "string"),
        ("output", "''", "must not be empty"),
        ("lora.bias", "some", "'none', 'all' or 'lora_only'"),
        ("lora.bias", "3", "'none', 'all' or 'lora_only'"),
        ("lora.target_modules", "[q_proj, 3]", "string"),
        ("lora.target_modules", "[]", "at least one module"),
        ("lora.target_modules", "''", "at least one module"),
        ("lora.layers", "last", "last 6"),
        ("lora.layers", "last 0", "last 6"),
        ("lora.layers", "9-3", "last 6"),
        ("lora.layers", "6", "string"),
        ("lora.modules_to_save", "{a: b}", "list"),
        ("prompt.system", "[a]", "string"),
        ("tracking.report_to", "[none, post]", "tensorboard"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_the_expected_one(
    recipe_file: Any, dotted: str, text: str, told: str
) -> None:
    message = refusal(recipe_file(with_setting(dotted, text)))
    assert f"line 3: {dotted}: " in message
    assert told in message


@pytest.mark.parametrize("text", ["[]", "[3]", "null", "''"])
def test_data_train_must_be_names_of_files(recipe_file: Any, text: str) -> None:
    assert "line 2: data.train: " in refusal(recipe_file(f"model: {{base: x}}\ndata: {{train: {text}}}\n"))


BOUNDS = [
    (dotted, name, getattr(rule, name))
    for dotted, field in SETTINGS.items()
    for rule in field.metadata
    for name in ("ge", "gt", "le", "lt")
    if getattr(rule, name, None) is not None
]


@pytest.mark.parametrize(("dotted", "name", "bound"), BOUNDS)
def test_every_bound_is_kept_to_the_value(recipe_file: Any, dotted: str, name: str, bound: float) -> None:
    is_whole = int in (SETTINGS[dotted].annotation, *get_args(SETTINGS[dotted].annotation))
    step = 1 if is_whole else 1e-9
    outward = -step if name in ("ge", "gt") else step
    refused = bound if name in ("gt", "lt") else bound + outward
    allowed = bound - outward if name in ("gt", "lt") else bound
    message = refusal(recipe_file(with_setting(dotted, repr(refused))))
    assert f"line 3: {dotted}: must be" in message
    assert f"{bound:g}" in message or str(bound) in message
    recipe = load_recipe(recipe_file(with_setting(dotted, repr(allowed))), {})
    assert value_of(recipe, dotted) == allowed


NUMBERS = [
    dotted for dotted, field in SETTINGS.items() if {int, float} & {field.annotation, *get_args(field.annotation)}
]


@pytest.mark.parametrize("dotted", NUMBERS)
@pytest.mark.parametrize("text", ["-1", ".nan", ".inf", "1" * 400, "1e999", "true"])
def test_no_number_may_be_negative_endless_or_a_truth_value(recipe_file: Any, dotted: str, text: str) -> None:
    section, _, name = dotted.rpartition(".")
    recipe = {"model": "{base: x}", "data": "{train: [a.json]}"}
    recipe[section or name] = f"{{{name}: {text}}}" if section else text
    recipe["data"] = recipe["data"] if section != "data" else f"{{train: [a.json], {name}: {text}}}"
    message = refusal(recipe_file("".join(f"{key}: {value}\n" for key, value in recipe.items())))
    assert re.search(rf"line \d: ({re.escape(dotted)}: |a number of more than)", message)


@pytest.mark.parametrize("text", ["1", "0.95", "-0.1"])
def test_a_validation_fraction_lies_between_0_and_09(recipe_file: Any, text: str) -> None:
    message = refusal(recipe_file(f"model: {{base: x}}\ndata:\n  train: a.json\n  validation: {text}\n"))
    assert "line 4: data.validation: a fraction must be between 0 and 0.9" in message


def test_a_warmup_from_one_up_counts_whole_steps(recipe_file: Any) -> None:
    assert "must be whole" in refusal(recipe_file(with_setting("training.warmup", "1.5")))
    assert load_recipe(recipe_file(with_setting("training.warmup", "20")), {}).training.warmup == 20


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("training: {max_steps: 10, warmup: 10}", "training.warmup must be shorter than training.max_steps"),
        ("model: {base: x, quantization: nf4}\nlora: {modules_to_save: lm_head}", "lora.modules_to_save"),
        ("lora: {init: olora}\ntraining: {weight_decay: 0.1}", "which training.weight_decay would shrink"),
        ("lora: {init: pissa, target_modules: experts}", "not available for experts"),
        ("lora: {init: eva, target_modules: experts}", "not available for experts"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(recipe_file: Any, text: str, told: str) -> None:
    start = "data: {train: a.json}\n" if text.startswith("model") else MINIMAL
    assert told in refusal(recipe_file(start + text))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lora:\n  ranks: 8", "line 4: lora.ranks: no such setting; did you mean lora.rank?"),
        ("trainning: {epochs: 3}", "line 3: trainning: no such setting; did you mean training?"),
        ("learning_rate: 1e-4", "line 3: learning_rate: no such setting; did you mean training.learning_rate?"),
        ("lora: {learning_rate: 1}", "lora.learning_rate: no such setting; did you mean training.learning_rate?"),
        ("sed: 1", "line 3: sed: no such setting; did you mean seed?"),
        ("training: {batchsize: 4}", "did you mean training.batch_size?"),
        ("qqqqqq: 1", "line 3: qqqqqq: no such setting"),
        ("5: 1", "line 3: 5: no such setting"),
        ("lora: {rank: {deep: 1}}", "line 3: lora.rank: must be a valid integer"),
    ],
)
def test_an_unknown_key_is_told_with_its_line_and_the_nearest_name(recipe_file: Any, text: str, told: str) -> None:
    assert told in refusal(recipe_file(MINIMAL + text))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "the file is empty"),
        ("# nothing\n", "the file is empty"),
        ("- model\n- data\n", "not a list"),
        ('[{"instruction": "a", "output": "b"}]', "give rows with --data.train"),
        ("just words", "single value"),
        ("5", "single value"),
        ("model: {base: x}\n---\ndata: {train: a}\n", "line 2: not valid YAML"),
        ("model: 5\ndata: [a]\n", "line 1: model: must hold settings of its own"),
        ("model: {}\ndata: {}\n", "model.base: must be given"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(recipe_file: Any, text: str, told: str) -> None:
    assert told in refusal(recipe_file(text))


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_rows_in_place_of_a_recipe_are_told_with_their_flag(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("instruction,output\nHi: there,Hello\n")
    assert "rows, not a recipe; give them with --data.train" in refusal(str(tmp_path / name))


def test_a_run_in_place_of_its_recipe_is_told_with_the_recipe(tmp_path: Path) -> None:
    assert "did you mean" not in refusal(str(tmp_path))
    (tmp_path / "recipe.yaml").write_text("model: {base: tiny-qwen}\n")
    assert f"did you mean {tmp_path / 'recipe.yaml'}?" in refusal(str(tmp_path))


def test_a_refused_value_is_not_told_a_second_time_as_missing(recipe_file: Any) -> None:
    message = refusal(recipe_file("model:\n  base: !secret x\ndata: {train: a.json}\n"))
    assert "a problem:" in message
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize("section", ["lora", "prompt", "training", "evaluation", "checkpoints", "tracking"])
def test_a_section_whose_settings_are_all_commented_out_means_its_defaults(recipe_file: Any, section: str) -> None:
    recipe = load_recipe(recipe_file(f"{MINIMAL}{section}:\n  # rank: 8\n"), {})
    assert recipe == load_recipe(recipe_file(MINIMAL), {})


def test_null_is_the_default_only_where_the_default_is_none(recipe_file: Any) -> None:
    for dotted, field in SETTINGS.items():
        if dotted.startswith(("model.", "data.")):
            continue
        config = recipe_file(with_setting(dotted, "null"))
        if field.default is None:
            assert value_of(load_recipe(config, {}), dotted) is None
        else:
            assert f"line 3: {dotted}: " in refusal(config)


def test_a_file_that_is_not_utf_8_is_refused_with_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes("# 配置\n".encode("gbk") + MINIMAL.encode())
    assert "not UTF-8 text (byte 2)" in refusal(str(path))


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + (MINIMAL + "seed: 7\n").replace("\n", "\r\n").encode())
    assert load_recipe(str(path), {}).seed == 7


def test_a_flag_takes_precedence_over_the_recipe_and_the_recipe_over_the_default(recipe_file: Any) -> None:
    config = recipe_file(MINIMAL + "lora: {rank: 8, alpha: 24}\n")
    recipe = load_recipe(config, {"lora.rank": "4", "seed": "5"})
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout, recipe.seed) == (4, 24, 0.0, 5)


def test_flags_alone_make_a_recipe() -> None:
    recipe = load_recipe(None, {"model.base": "x", "data.train": ["a.json", "b.jsonl"], "lora.use_dora": True})
    assert recipe.data.train == ["a.json", "b.jsonl"]
    assert recipe.lora.use_dora is True


@pytest.mark.parametrize(
    ("dotted", "given", "value"),
    [
        ("training.learning_rate", "2e-4", 2e-4),
        ("training.max_steps", "null", None),
        ("model.revision", "010", "010"),
        ("model.revision", "null", None),
        ("prompt.system", "Be brief: yes", "Be brief: yes"),
        ("prompt.instruction_prefix", "# ", "# "),
        ("lora.target_modules", ["q_proj"], ["q_proj"]),
        ("lora.target_modules", ["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        ("lora.target_modules", ["q_proj,v_proj"], ["q_proj", "v_proj"]),
        ("lora.target_modules", ["attention"], "attention"),
        ("lora.modules_to_save", ["embed_tokens, lm_head"], ["embed_tokens", "lm_head"]),
        ("lora.modules_to_save", ["lm_head"], ["lm_head"]),
        ("data.validation", ["0.2"], 0.2),
        ("data.validation", ["0"], 0.0),
        ("data.validation", ["dev.json"], ["dev.json"]),
        ("data.validation", ["a.json", "b.json"], ["a.json", "b.json"]),
        ("data.placeholders", ["name=x"], {"name": "x"}),
        ("data.placeholders", ["name=小李", "author=a=b"], {"name": "小李", "author": "a=b"}),
        ("data.placeholders", ["name="], {"name": ""}),
        ("lora.rank_pattern", ["o_proj=16", "layers.0=4"], {"o_proj": 16, "layers.0": 4}),
        ("lora.alpha_pattern", ["o_proj=1e-1"], {"o_proj": 0.1}),
        ("tracking.report_to", ["tensorboard", "wandb"], ["tensorboard", "wandb"]),
        ("lora.use_rslora", True, True),
        ("model.double_quantization", False, False),
    ],
)
def test_a_flag_is_read_as_its_setting_wants_it(recipe_file: Any, dotted: str, given: Any, value: Any) -> None:
    recipe = load_recipe(recipe_file(MINIMAL), {dotted: given})
    assert value_of(recipe, dotted) == value
    assert type(value_of(recipe, dotted)) is type(value)


@pytest.mark.parametrize(
    ("dotted", "given", "told"),
    [
        ("lora.rank", "8.5", "integer"),
        ("lora.rank", "true", "integer"),
        ("lora.rank", "", "integer"),
        ("lora.rank", "[8", "cannot read '[8'"),
        ("lora.rank", "8: 9", "integer"),
        ("lora.rank", "0", "greater than or equal to 1"),
        ("lora.rank", "\udcff", "not UTF-8"),
        ("training.epochs", "three", "number"),
        ("training.max_steps", "9" * 5000, "cannot read"),
        ("prompt.system", "\udcff", "not UTF-8"),
        ("data.train", ["\udcff.json"], "not UTF-8"),
        ("data.placeholders", ["name"], "write name=value, got 'name'"),
        ("data.placeholders", ["=x"], "write name=value, got '=x'"),
        ("data.placeholders", ["name=a,company=b"], "give the flag once for each name=value"),
        ("lora.rank_pattern", ["o_proj=8, q_proj=4"], "give the flag once for each name=value"),
        ("data.remove", ["empty,duplicates"], "give the flag once for each name, got 'empty,duplicates'"),
        ("data.validation", ["1.5"], "between 0 and 0.9"),
        ("lora.rank_pattern", ["o_proj=8.5"], "integer"),
        ("lora.rank_pattern", ["o_proj=0"], "greater than or equal to 1"),
        ("model.hub", "github", "'huggingface' or 'modelscope'"),
        ("tracking.report_to", ["post"], "tensorboard"),
    ],
)
def test_a_wrong_flag_is_named_as_a_flag(recipe_file: Any, dotted: str, given: Any, told: str) -> None:
    message = refusal(recipe_file(MINIMAL), {dotted: given})
    assert f"--{dotted}: " in message
    assert told in message
    assert "line" not in message


def test_mistakes_of_flags_and_recipe_are_told_together(recipe_file: Any) -> None:
    config = recipe_file(MINIMAL + "lora: {rank: 0}\nseed: x\n")
    message = refusal(config, {"training.epochs": "0", "data.placeholders": ["x"]})
    assert "4 problems" in message
    for place in ("line 3: lora.rank", "line 4: seed", "--training.epochs", "--data.placeholders"):
        assert place in message


def test_a_flag_mends_a_mistake_of_the_recipe(recipe_file: Any) -> None:
    config = recipe_file(MINIMAL + "lora: {rank: 0}\n")
    assert load_recipe(config, {"lora.rank": "8"}).lora.rank == 8


def test_a_missing_recipe_is_told_with_the_shipped_names_and_the_nearest() -> None:
    message = refusal("quikstart")
    assert "did you mean quickstart?" in message
    for path in SHIPPED:
        assert path.stem in message


@pytest.mark.parametrize("name", ["", "/", "a" * 300, "no\0name", "configs"])
def test_a_name_that_cannot_be_a_file_is_refused(name: str) -> None:
    assert "no such file" in refusal(name)


def test_settings_cannot_be_changed_once_loaded(recipe_file: Any) -> None:
    recipe = load_recipe(recipe_file(MINIMAL), {})
    with pytest.raises(ValidationError):
        recipe.lora.rank = 9  # type: ignore[misc]


# --- shipped recipes ---


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_found_by_its_bare_name(path: Path) -> None:
    assert find_recipe(path.stem) == find_recipe(path.name) == path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_holds_only_what_differs_from_the_defaults(path: Path) -> None:
    recipe = load_recipe(str(path), {})
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    for dotted, field in SETTINGS.items():
        section, _, name = dotted.rpartition(".")
        place = written.get(section) or {} if section else written
        if name in place and not field.is_required():
            assert value_of(recipe, dotted) != field.default, f"{dotted} repeats its default"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_data_of_a_shipped_recipe_is_found_from_any_folder(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in load_recipe(path.stem, {}).data.train:
        assert Path(name.partition("#")[0]).is_file()


def test_data_beside_the_recipe_is_found_and_keeps_its_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "rows.json").write_text("[]")
    (folder / "odd#1.json").write_text("[]")
    config = folder / "r.yaml"
    config.write_text("model: {base: x}\ndata: {train: ['rows.json#5', 'odd#1.json#2'], validation: rows.json}\n")
    monkeypatch.chdir(tmp_path)
    data = load_recipe(str(config), {}).data
    assert data.train == [str(folder / "rows.json#5"), str(folder / "odd#1.json#2")]
    assert data.validation == [str(folder / "rows.json")]


def test_data_below_the_current_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    for place in (folder, tmp_path):
        (place / "rows.json").write_text("[]")
    config = folder / "r.yaml"
    config.write_text("model: {base: x}\ndata: {train: rows.json}\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe(str(config), {}).data.train == ["rows.json"]


def test_a_tilde_is_the_home_folder(recipe_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "model: {base: x}\ndata: {train: [~/a.json#5, {path: ~/b.json}, c~/d.json]}\noutput: ~/out\n"
    recipe = load_recipe(recipe_file(text), {})
    assert recipe.output == f"{tmp_path}/out"
    assert recipe.data.train_names == [f"{tmp_path}/a.json#5", f"{tmp_path}/b.json", "c~/d.json"]
    assert load_recipe(recipe_file(text), {"output": "~"}).output == str(tmp_path)


def test_nothing_of_the_environment_gets_into_a_recipe(recipe_file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hf_hidden")
    text = "model: {base: x}\ndata: {train: [a.json]}\nprompt: {system: '${SECRET} $SECRET $(id) {{SECRET}}'}\n"
    recipe = load_recipe(recipe_file(text), {})
    assert recipe.prompt.system == "${SECRET} $SECRET $(id) {{SECRET}}"
    assert "hf_hidden" not in dump_recipe(recipe)


@pytest.mark.parametrize("name", ["a" * 300 + ".json", "no\0name.json", "absent.json"])
def test_data_that_is_nowhere_keeps_its_name(name: str) -> None:
    assert load_recipe(None, {"model.base": "x", "data.train": [name]}).data.train == [name]


# --- every setting ---


@pytest.mark.parametrize("dotted", SETTINGS)
def test_every_setting_has_a_sentence_that_describes_it(dotted: str) -> None:
    description = SETTINGS[dotted].description or ""
    assert description[:1].isupper() or description.split()[0] in ("auto", "chat")
    assert description.endswith(".")
    assert "\n" not in description


def read_settings() -> set[str]:
    """`place.name` of every attribute that the package reads outside the recipe's own modules."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "recipe":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                place = node.value
                found.add(f"{getattr(place, 'attr', getattr(place, 'id', ''))}.{node.attr}")
    return found


READ = read_settings()
TEMPLATE_SETTINGS = {f"prompt.{name}" for name in TEMPLATE_ARGUMENTS}


@pytest.mark.parametrize("dotted", SETTINGS)
def test_every_setting_is_read_outside_the_recipe(dotted: str) -> None:
    section, _, name = dotted.rpartition(".")
    if dotted in TEMPLATE_SETTINGS:  # which are read all at once
        name = "template_arguments"
    assert READ & {f"{section or 'recipe'}.{name}", f"settings.{name}"}, f"{dotted} has no effect"


# --- writing ---

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.from_regex(
    r"[-+.0-9eE_:]{1,5}", fullmatch=True
)
NAME = TEXT.filter(str.strip)  # a blank name is refused
MODULE = NAME.filter(lambda name: "," not in name)  # commas separate names, and none of them may be empty


def setting_values(field: Any, kind: Any) -> st.SearchStrategy[Any]:
    """Random valid values of a setting's type, within its bounds."""
    bounds = {
        name: getattr(rule, name)
        for rule in field.metadata
        for name in ("ge", "gt", "le", "lt")
        if getattr(rule, name, None) is not None
    }
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(bounds["ge"], bounds.get("le", 10**9))
    if kind is float:
        low, high = bounds.get("ge", bounds.get("gt", 0.0)), bounds.get("le", bounds.get("lt", 1e12))
        return st.floats(low, high, exclude_min="gt" in bounds, exclude_max="lt" in bounds)
    if kind is str:
        return NAME
    if kind is type(None):
        return st.none()
    if get_origin(kind) is Literal:
        return st.sampled_from(get_args(kind))
    if get_origin(kind) is list:
        return st.lists(setting_values(field, get_args(kind)[0]), min_size=1, max_size=3)
    if get_origin(kind) is dict and get_origin(of := get_args(kind)[1]) is Annotated:
        number, bounded = get_args(of)
        return st.dictionaries(NAME, setting_values(bounded, number), max_size=3)
    if get_origin(kind) is dict:
        return st.dictionaries(NAME, TEXT, max_size=3)
    return st.one_of([setting_values(field, part) for part in get_args(kind)])


SPECIAL = {
    "data.train": st.lists(NAME, min_size=1, max_size=2),
    "data.columns": st.dictionaries(NAME, NAME, max_size=3),
    "data.severity": st.dictionaries(st.sampled_from(["short", "overlap"]), st.sampled_from(["refuse", "ignore"])),
    "lora.target_modules": st.sampled_from(get_args(TargetGroup)) | st.lists(MODULE, min_size=1, max_size=3),
    "freeze.layers": st.none(),
    "lora.layers": st.none() | st.sampled_from(["last 6", "first 1", "0-0", "8-15"]),
    "data.validation": st.floats(0, 0.9) | st.lists(NAME, min_size=1, max_size=2),
    "prompt.date": st.none() | st.dates().map(str),
    "training.warmup": st.floats(0, 1, exclude_max=True) | st.integers(1, 10**6).map(float),
}


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    values: dict[str, Any] = {}
    for dotted, field in SETTINGS.items():
        section, _, name = dotted.rpartition(".")
        place = values.setdefault(section, {}) if section else values
        place[name] = draw(SPECIAL[dotted] if dotted in SPECIAL else setting_values(field, field.annotation))
    if values["method"] != "lora":
        values["lora"] = {"target_modules": "all-linear", "init": "default"}
        values["model"] |= {"quantization": "none", "sharding": "none"}
    values["freeze"] = {"layers": "last 2", "modules": ["mlp"]} if values["method"] == "freeze" else {}
    if "experts" in listed(values["lora"]["target_modules"]):
        values["lora"] |= {"dropout": 0.0, "use_dora": False}
        values["model"]["quantization"] = "none"
    if values["model"]["quantization"] != "none":
        values["lora"]["modules_to_save"] = []
    if values["lora"]["init"] in ("pissa", "olora"):
        values["training"]["weight_decay"] = 0.0
    if values["lora"]["init"] in ("pissa", "olora", "eva"):
        values["lora"]["target_modules"] = "all-linear"
    if "near_duplicates" in values["data"]["remove"]:
        values["data"]["near_duplicates"] = 0.8
    if values["training"]["max_steps"] and values["training"]["warmup"] >= values["training"]["max_steps"]:
        values["training"]["max_steps"] = None
    return Recipe.model_validate(values)


@settings(deadline=None, max_examples=60)
@given(recipe=recipes())
def test_a_written_recipe_loads_back_equal(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8", newline="")
    assert load_recipe(str(path), {}).model_dump() == recipe.model_dump()


WORDS = st.sampled_from(["model", "base", "data", "train", "lora", "rank", "8", "1e-4", "null", "~"]) | st.sampled_from(
    [
        ": ",
        "- ",
        "\n",
        "\n  ",
        "{",
        "}",
        "[",
        "]",
        ",",
        "'",
        '"',
        "#",
        "&a ",
        "*a",
        "!!int ",
        "!x ",
        "---\n",
        "? ",
        "|\n",
        "\t",
    ]
)


def loaded_or_refused(config: str | None, flags: dict[str, Any]) -> Recipe | LoratuneError:
    """What comes of a recipe; anything but these two is a bug and fails the test."""
    try:
        return load_recipe(config, flags)
    except LoratuneError as error:
        return error


@settings(deadline=None, max_examples=100)
@given(text=st.text(max_size=30) | st.lists(WORDS, max_size=14).map("".join), after=st.booleans())
def test_any_text_loads_or_is_refused_as_wrong_usage(
    text: str, after: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    path.write_bytes(((MINIMAL if after else "") + text).encode("utf-8", "surrogatepass"))
    outcome = loaded_or_refused(str(path), {})
    assert isinstance(outcome, Recipe) or outcome.exit_code == Exit.USAGE


@settings(deadline=None, max_examples=100)
@given(
    dotted=st.sampled_from(list(SETTINGS)), given_text=st.text(max_size=8) | st.lists(WORDS, max_size=4).map("".join)
)
def test_any_text_of_a_flag_loads_or_is_refused_as_wrong_usage(dotted: str, given_text: str) -> None:
    flags: dict[str, Any] = {"model.base": "x", "data.train": ["a.json"]}
    kind = SETTINGS[dotted].annotation
    takes_list = get_origin(kind) in (list, dict) or any(get_origin(part) is list for part in get_args(kind))
    flags[dotted] = [given_text] if takes_list else given_text
    outcome = loaded_or_refused(None, flags)
    if not isinstance(outcome, Recipe):
        assert outcome.exit_code == Exit.USAGE
        assert dotted in str(outcome)


# --- advice ---


def advice(**sections: Any) -> list[str]:
    """Advice for the defaults with some settings changed."""
    values = {"model": {"base": "x"}, "data": {"train": ["a.json"]}}
    return advise(Recipe.model_validate(values | sections))


def test_a_good_recipe_gets_no_advice() -> None:
    assert advice() == []


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"lora": {"alpha": 4}}, "lora.alpha × training.learning_rate is 0.0012, below 0.002"),
        ({"lora": {"alpha": 512}}, "lora.alpha × training.learning_rate is 0.15, above 0.08"),
        ({"lora": {"alpha": 128, "use_rslora": True}}, "training.learning_rate × √lora.rank is 0.15, above 0.08"),
        ({"lora": {"b_learning_rate_ratio": 16}}, "learning_rate × lora.b_learning_rate_ratio is 0.15, above 0.08"),
        ({"lora": {"rank": 32, "alpha": 64}}, "--max-lora-rank 32"),
        ({"lora": {"rank": 20, "alpha": 40}}, "--max-lora-rank 32"),  # vLLM takes no 20
        ({"lora": {"rank": 600, "alpha": 1200}}, "has to be merged"),
        ({"lora": {"use_dora": True}}, "lora.use_dora: vLLM and SGLang cannot serve such an adapter; merge it"),
        ({"lora": {"use_rslora": True}}, "lora.use_rslora: SGLang cannot serve"),
        ({"lora": {"bias": "all"}}, "lora.bias all: vLLM and SGLang"),
        ({"lora": {"modules_to_save": ["head"]}}, "lora.modules_to_save: vLLM and SGLang"),
        ({"training": {"learning_rate": 1e-5}}, "training.learning_rate is 0.00032, below 0.002"),
        ({"training": {"learning_rate": 0.1}}, "training.learning_rate is 3.2, above 0.08"),
        (
            {"training": {"max_steps": 400, "epochs": 2}},
            "training.max_steps 400 takes precedence over training.epochs 2",
        ),
        ({"data": {"train": ["a.json"], "validation": 0.0}}, "no validation rows"),
        ({"data": {"train": ["a.json"], "validation": 0.0}, "training": {"epochs": 20}}, "memorise the rows"),
    ],
)
def test_a_setting_that_usually_ends_badly_gets_advice(sections: dict[str, Any], told: str) -> None:
    assert any(told in sentence for sentence in advice(**sections))


def test_the_borders_of_advice_are_good() -> None:
    for lora, borders in (({"alpha": 32}, (2e-3 / 32, 0.08 / 32)), ({"alpha": 16, "rank": 16}, (2e-3 / 16, 0.08 / 16))):
        for border, beyond in zip(borders, (0.99, 1.01), strict=True):
            assert advice(lora=lora, training={"learning_rate": border}) == []
            assert len(advice(lora=lora, training={"learning_rate": beyond * border})) == 1


def test_a_rank_is_no_reason_for_advice_beyond_what_servers_take() -> None:
    """The published sweep has its lowest losses at ranks of 64 and 128, with alpha 32 all the same."""
    assert [told.partition(":")[0] for told in advice(lora={"rank": 128})] == [
        "lora.rank 128 is above vLLM's default limit"
    ]


# --- JSON Schema ---


@pytest.mark.parametrize("path", [*SHIPPED, *shipped_sweeps()], ids=lambda path: path.stem)
def test_a_shipped_recipe_names_a_schema_beside_it_that_it_fits(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
    assert named
    schema = json.loads((path.parent / named[1]).read_text(encoding="utf-8"))
    assert schema == (recipe_schema() if path in SHIPPED else sweep_schema())
    assert [error.message for error in Draft202012Validator(schema).iter_errors(read_yaml(text).values)] == []


def test_a_written_recipe_earlier_names_and_short_forms_fit_the_schema() -> None:
    values = read_yaml(dump_recipe(load_recipe("quickstart", {}))).values
    assert SCHEMA.is_valid(values)
    short = {"model": {"base": "x"}, "data": {"train": "a.json"}}
    assert SCHEMA.is_valid(short | {"lora": None, "tracking": {"report_to": "none"}})
    for old, new in RENAMED.items():
        section, _, name = old.rpartition(".")
        known = short.get(section, {}) | {name: values[section][new.rpartition(".")[2]]}
        assert SCHEMA.is_valid(short | {section: known}), old
    for name in DROPPED:
        section, _, key = name.rpartition(".")
        assert SCHEMA.is_valid(short | {section: {key: 2}})


def test_the_schema_describes_every_setting_with_default_and_bounds() -> None:
    schema = recipe_schema()
    for dotted, field in SETTINGS.items():
        section, _, name = dotted.rpartition(".")
        kind = Recipe.model_fields[section].annotation.__name__ if section else None
        found = (schema["$defs"][kind] if kind else schema)["properties"][name]
        assert found["description"] == " ".join((field.description or "").split())
        assert found.get("default") == (None if field.is_required() else field.default), dotted
    rank = schema["$defs"]["LoraSettings"]["properties"]["rank"]
    assert (rank["minimum"], rank["maximum"]) == (1, 4096)
    assert all(one["additionalProperties"] is False for one in [schema, *schema["$defs"].values()])


def test_patterns_are_expressions_of_javascript_too() -> None:
    """Editors run them; Python's names of groups are an error there."""
    assert re.findall(r"\(\?(?!:)", json.dumps(recipe_schema())) == []


def test_a_shipped_recipe_s_placeholders_are_for_its_own_rows() -> None:
    own = {"name": "小李", "author": "小张"}
    assert load_recipe("qwen7b", {}).data.placeholders == own
    assert load_recipe("qwen7b", {"data.train": ["faq.json"]}).data.placeholders == {}
    assert load_recipe("qwen7b", {"data.train": ["data/identity.json", "faq.json"]}).data.placeholders == own
    given = {"data.train": ["faq.json"], "data.placeholders": ["name=Bo"]}
    assert load_recipe("qwen7b", given).data.placeholders == {"name": "Bo"}
