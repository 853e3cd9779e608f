"""`loratune import`: recipes from the configs of other tools, with an account of every setting, and rows compared."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import Result

from loratune.data.encoding.encoder import IGNORED, Encoder, Example
from loratune.data.formats.conversation import Conversation
from loratune.data.formats.registry import ConversationReader, detect_format
from loratune.errors import Exit, LoratuneError
from loratune.migration import config_file
from loratune.migration.comparison import compare_rows
from loratune.migration.config_file import read_config
from loratune.migration.peer_forms import CHATML, LLAMA_FACTORY_FORMS, WholeTemplate, form_of
from loratune.migration.recognition import TOOLS, recognised
from loratune.migration.sheet import Sheet
from loratune.migration.shell_command import ShellCommand, read_command
from loratune.migration.tool import Tool
from loratune.migration.translation import Translation, translate
from loratune.model.files import find_tokenizer
from loratune.model.tokenizer import load_tokenizer
from loratune.recipe.loading import load_recipe
from loratune.recipe.sections import ModelSettings, Recipe, flat_settings
from loratune.recipe.yaml_reader import read_yaml

CLI = Callable[..., Result]
LLAMA_FACTORY = {
    "model_name_or_path": "tiny-qwen",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_target": "all",
    "dataset": "mine,talk",
    "dataset_dir": "data",
    "template": "qwen3_nothink",
    "cutoff_len": 2048,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "warmup_ratio": 0.1,
    "lr_scheduler_type": "cosine",
    "bf16": True,
    "report_to": "none",
    "overwrite_cache": True,
    "output_dir": "saves/mine",
}
DATA_SETS: dict[str, Any] = {
    "mine": {"file_name": "mine.json", "columns": {"prompt": "question", "response": "answer"}},
    "talk": {
        "file_name": "talk.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "turns"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "pictures": {"file_name": "p.json", "columns": {"prompt": "q", "images": "images"}},
    "pairs": {"file_name": "p.json", "ranking": True},
    "odd": {"file_name": "o.json", "formatting": "sharegpt", "tags": {"user_tag": "person"}},
    "hub": {"hf_hub_url": "org/rows", "subset": "de", "split": "test", "num_samples": 7},
}
SWIFT = """\
#!/bin/bash
# don't run this: the options follow
nproc_per_node=2
touch planted
CUDA_VISIBLE_DEVICES=0,1 NPROC_PER_NODE=$nproc_per_node \\
swift sft \\
    --model Qwen/Qwen2.5-7B-Instruct \\
    --tuner_type lora \\
    --dataset 'org/rows#500' rows.jsonl \\
              'swift/self-cognition#20' \\
    --model_name 'My bot' \\
    --gradient_accumulation_steps $(expr 16 / $nproc_per_node) \\
    --learning_rate 2e-4 \\
    --system 'You are a helpful assistant.' \\
    --max_length 2048 --use_hf true \\
    --deepspeed zero2; rm -rf out
"""
AXOLOTL: dict[str, Any] = {
    "base_model": "tiny-qwen",
    "load_in_4bit": True,
    "adapter": "qlora",
    "lora_r": 32,
    "lora_alpha": 16,
    "lora_target_linear": True,
    "datasets": [{"path": "org/rows", "type": "chat_template", "split": "train[:500]", "field_messages": "turns"}],
    "val_set_size": 0.05,
    "sequence_len": 4096,
    "sample_packing": True,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "num_epochs": 2,
    "optimizer": "adamw_bnb_8bit",
    "lr_scheduler": "cosine",
    "learning_rate": 0.0002,
    "evals_per_epoch": 4,
    "wandb_project": None,
    "bf16": "auto",
    "tf32": False,
}
UNSLOTH = {
    "model": "tiny-qwen",
    "data": {"dataset": "org/rows", "format_type": "auto"},
    "training": {
        "max_seq_length": 512,
        "num_epochs": 0,
        "max_steps": 30,
        "train_on_completions": True,
        "packing": False,
    },
    "lora": {"lora_r": 16, "target_modules": ["q_proj", "v_proj"], "use_loftq": False},
    "logging": {"enable_wandb": False},
}
TRL = {"model_name_or_path": "tiny-qwen", "dataset_name": "org/rows", "use_peft": True, "assistant_only_loss": True}
ROWS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Two?"},
                  {"role": "assistant", "content": "2"}, {"role": "user", "content": "Three?"},
                  {"role": "assistant", "content": "3"}]},
]  # fmt: skip


@pytest.fixture(autouse=True)
def _working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(DATA_SETS))


def written(values: Any, name: str = "config.yaml") -> Path:
    path = Path(name)
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values, allow_unicode=True))
    return path


def imported(values: Any, name: str = "config.yaml", **options: Any) -> Translation:
    return translate(written(values, name), None, options.get("flags", {}), options.get("devices"), None)


def settings(found: Translation) -> dict[str, Any]:
    """Every setting of the recipe as `sft` loads it from its file."""
    Path("recipe.yaml").write_text(found.text)
    return flat_settings(load_recipe("recipe.yaml", {}))


def test_what_a_misspelt_name_leaves_to_a_default_is_told_as_one() -> None:
    found = imported(LLAMA_FACTORY | {"dataset": "tlak", "lora_alpha": 8, "lora_rnk": 4})
    (entry,) = (entry for entry in found.sheet.taken if entry.setting == "lora.rank")
    assert (entry.names, entry.defaults) == (("lora_alpha",), ("lora_rank",))
    (rows,) = (rows for title, rows in found.lists if title.startswith("taken over"))
    assert ("lora_alpha\nlora_rank (default)", "lora.rank: 8") in rows
    assert "did you mean lora_rank?" in reasons(found)
    assert "does not describe it; did you mean talk?" in reasons(found)
    given = imported(LLAMA_FACTORY | {"lora_alpha": 8, "lora_rank": 4})
    (entry,) = (entry for entry in given.sheet.taken if entry.setting == "lora.rank")
    assert entry.defaults == ()


def reasons(found: Translation) -> str:
    return "\n".join(f"{', '.join(entry.names)}: {entry.reason}" for entry in found.lost)


def test_a_config_of_llama_factory_becomes_the_recipe_that_it_means() -> None:
    found = imported(LLAMA_FACTORY, devices=2)
    assert not found.lost
    expected = flat_settings(
        Recipe.model_validate(
            {
                "model": {"base": "tiny-qwen"},
                "lora": {"rank": 8, "alpha": 16.0, "dropout": 0.0},
                "data": {
                    "train": ["data/mine.json", "data/talk.jsonl"],
                    "validation": 0.0,
                    "columns": {"instruction": "question", "output": "answer", "conversations": "turns"},
                },
                "training": {"batch_size": 32, "max_length": 2048, "learning_rate": 5e-5, "warmup": 0.1},
                "output": "saves/mine",
            }
        )
    )
    assert settings(found) == expected
    values = yaml.safe_load(found.text)
    assert values["lora"]["rank"] == 8
    assert "scheduler" not in values["training"]  # cosine, as in loratune
    assert "# there, the template is LLaMA-Factory's qwen3_nothink" in found.text


def test_a_setting_that_a_config_leaves_out_has_the_default_of_its_tool() -> None:
    for tool, values, learning_rate, weight_decay in [
        ("LLaMA-Factory", {**LLAMA_FACTORY}, 5e-5, 0.0),
        ("ms-swift", {"model": "tiny-qwen", "tuner_type": "lora", "dataset": "a.jsonl", "max_length": 99}, 1e-4, 0.1),
        ("TRL", TRL, 2e-5, 0.0),
        ("unsloth", UNSLOTH, 2e-4, 0.01),
    ]:
        found = imported(values)
        assert found.tool == tool
        flat = settings(found)
        assert (flat["training.learning_rate"], flat["training.weight_decay"]) == (learning_rate, weight_decay)
        assert flat["data.validation"] == 0.0


def test_a_shell_script_is_read_and_not_executed(tmp_path: Path) -> None:
    found = imported(SWIFT, "run.sh")
    flat = settings(found)
    assert not found.lost
    assert not (tmp_path / "planted").exists()
    assert flat["data.train"][0] == "hf:org/rows:train#500"
    assert flat["data.train"][2] == "hf:swift/self-cognition:train#20"
    assert flat["data.placeholders.name"] == "My bot"
    assert flat["training.batch_size"] == 1 * (16 // 2) * 2
    assert flat["prompt.system"] == "You are a helpful assistant."
    assert flat["lora.alpha"] == 32
    assert [entry.names for entry in found.sheet.unneeded] == [("deepspeed",)]


def test_the_dump_of_a_run_is_read_without_what_nobody_has_set() -> None:
    """ms-swift writes every setting that it has, with its own defaults and names of no meaning here."""
    dump = {
        "swift_version": "3.9.0", "model": "org/base", "model_revision": None, "train_type": "lora", "rank": -1,
        "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8, "init_weights": True, "do_train": False,
        "dataset": ["org/rows#5"], "val_dataset": [], "model_name": ["my-bot", None], "max_length": 512,
        "target_modules": ["all-linear"], "gradient_accumulation_steps": 8, "global_world_size": 4, "use_hf": False,
        "router_aux_loss_coef": 0.0, "acc_strategy": "token", "agent_template": "hermes", "seed": 7, "data_seed": 42,
    }  # fmt: skip
    found = imported(json.dumps(dump), "args.json")
    assert not found.lost
    flat = settings(found)
    assert (flat["data.train"], flat["model.hub"]) == (["ms:org/rows:train#5"], "modelscope")
    assert (flat["training.batch_size"], flat["seed"], flat["data.seed"]) == (32, 7, 42)
    assert flat["lora.rank"] == 8
    eva = imported(json.dumps(dump | {"init_weights": "eva"}), "args.json")
    assert settings(eva)["lora.init"] == "eva"
    assert any("(rho 1)" in entry.reason for entry in eva.sheet.changed)
    asked = imported(json.dumps(dump | {"adam_beta2": 0.9}), "args.json")
    assert "adam_beta2 is 0.999 here" in reasons(asked)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("swift sft --learning_rate=1e-5 --warmup_ratio -0.5 --packing", "warmup_ratio", -0.5),
        ("A=3; export B=4\nswift sft --x ${A}$B", "x", 34),
        ("swift sft --x $((4 * 3)) # and --x 9", "x", 12),
        ("swift sft --x $(reboot)", "x", "$(reboot)"),
        ("torchrun --nproc_per_node 4 /opt/swift/cli/sft.py --x 'a#b;c'", "x", "a#b;c"),
        ("swift infer --x 1 && swift sft --x 2", "x", 2),
        ("swift sft --x 1 \\", "x", 1),
    ],
)
def test_the_options_of_a_shell_command(line: str, name: str, value: Any) -> None:
    assert read_config(written(line, "run.sh")).values[name] == value


def test_a_variable_that_only_a_shell_knows_is_a_loss() -> None:
    assert "a variable of the shell" in reasons(imported("swift sft --model $MODEL --dataset a.jsonl", "run.sh"))


def test_a_config_of_axolotl_becomes_the_recipe_that_it_means() -> None:
    found = imported(AXOLOTL)
    flat = settings(found)
    assert not found.lost
    assert flat["model.quantization"] == "nf4"
    assert (flat["lora.rank"], flat["lora.alpha"]) == (32, 16)
    assert flat["lora.target_modules"] == "all-linear"
    assert flat["data.train"] == ["hf:org/rows:train#500"]
    assert flat["data.columns.messages"] == "turns"
    assert flat["data.validation"] == 0.05
    assert flat["checkpoints.keep_best"] is False  # axolotl's final adapter is the last one
    assert flat["training.optimizer"] == "adamw_8bit"
    assert flat["training.warmup"] == 0.03
    assert "a row of a step is a pack of up to 4096 tokens" in " ".join(found.text.split()).replace("# ", "")


def test_rows_that_load_dataset_would_load_are_named_alike() -> None:
    for entry, expected in [
        ({"path": "org/rows", "name": "de", "split": "test"}, ["hf:org/rows:de:test"]),
        ({"path": "json", "data_files": ["a.jsonl", "b.jsonl"]}, ["a.jsonl", "b.jsonl"]),
        ({"path": "local/rows.jsonl"}, ["local/rows.jsonl"]),
    ]:
        assert settings(imported(AXOLOTL | {"datasets": [entry]}))["data.train"] == expected
        of_trl = {name: value for name, value in TRL.items() if name != "dataset_name"} | {"datasets": [entry]}
        assert settings(imported(of_trl))["data.train"] == expected


def test_duplicates_that_are_removed_there_are_removed_here() -> None:
    assert settings(imported(AXOLOTL | {"dataset_exact_deduplication": True}))["data.remove"] == ["duplicates"]
    assert settings(imported(AXOLOTL | {"dataset_exact_deduplication": False}))["data.remove"] == []


def test_configs_of_unsloth_and_trl_become_recipes() -> None:
    flat = settings(imported(UNSLOTH))
    assert (flat["training.max_steps"], flat["training.epochs"]) == (30, 3)
    assert flat["lora.target_modules"] == ["q_proj", "v_proj"]
    assert flat["model.quantization"] == "nf4"
    assert flat["training.warmup"] == 5
    assert flat["seed"] == 3407
    assert not imported(TRL | {"use_cpu": True}).lost
    flat = settings(imported(TRL))
    assert (flat["lora.rank"], flat["training.batch_size"], flat["training.max_length"]) == (16, 8, 1024)


def test_full_and_frozen_training_leave_the_adapter_s_settings_out() -> None:
    lora = {"lora_rank": 8, "pissa_init": True, "quantization_bit": 4, "deepspeed": "ds_z3_config.json"}
    found = imported(LLAMA_FACTORY | lora | {"finetuning_type": "full"})
    assert not found.lost
    assert load_recipe("recipe.yaml" if settings(found) else "", {}).trains_base
    unused = {name for entry in found.sheet.unneeded for name in entry.names}
    assert unused >= {"lora_rank", "lora_target", "pissa_init", "quantization_bit", "deepspeed"}
    frozen = {"finetuning_type": "freeze", "freeze_trainable_layers": -3, "freeze_trainable_modules": "mlp"}
    flat = settings(imported(LLAMA_FACTORY | frozen))
    assert (flat["freeze.layers"], flat["freeze.modules"]) == ("first 3", ["mlp"])
    assert settings(imported(LLAMA_FACTORY | {"pissa_init": True, "loraplus_lr_ratio": 16.0}))["lora.init"] == "pissa"
    full = imported({"model": "tiny-qwen", "tuner_type": "full", "dataset": "a.jsonl", "max_length": 99})
    assert settings(full)["training.learning_rate"] == 1e-5


def test_a_config_is_recognised_by_its_names() -> None:
    for values, tool in [(LLAMA_FACTORY, "LLaMA-Factory"), (AXOLOTL, "axolotl"), (UNSLOTH, "unsloth"), (TRL, "TRL")]:
        assert recognised(read_config(written(values))).name == tool
    for tool in TOOLS.values():
        grouped = [name for names in tool.rules for name in names]
        assert len(grouped) == len(set(grouped)), tool.name
    for one, other in itertools.combinations(TOOLS.values(), 2):
        assert not one.marks & other.marks
    with pytest.raises(LoratuneError, match="none of these tools"):
        recognised(read_config(written({"model": {"base": "x"}, "colour": 1})))
    with pytest.raises(LoratuneError, match="a recipe of loratune already"):  # unsloth too has a section `data`
        recognised(read_config(written({"model": {"base": "x"}, "data": {"train": "a.json"}, "seed": 1})))


def test_missing_descriptions_of_data_sets_are_told_with_the_flag_that_gives_them() -> None:
    (Path("data") / "dataset_info.json").rename("elsewhere.json")
    assert "--dataset-info says where it is" in reasons(imported(LLAMA_FACTORY))
    given = translate(written(LLAMA_FACTORY), None, {}, None, Path("elsewhere.json"))
    assert "dataset_info.json" not in reasons(given)


def test_an_unknown_name_is_a_loss_and_the_nearest_one_is_told() -> None:
    found = imported(AXOLOTL | {"context_parapllel_size": 2})
    assert "did you mean context_parallel_size?" in reasons(found)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stage": "dpo"}, "trains the stage sft, not dpo"),
        ({"dataset": "pictures"}, "rows with images; only texts are trained"),
        ({"dataset": "pairs"}, "preferences are not trained on"),
        ({"dataset": "odd"}, "turns with the roles 'person' for user"),
        ({"dataset": "nowhere"}, "does not describe it"),
        ({"train_on_prompt": True}, "only answers are trained"),
        ({"use_galore": True}, "a variant of AdamW"),
        ({"quantization_bit": 3}, "4 bits .nf4. or 8 bits"),
        ({"quantization_bit": 4, "quantization_method": "hqq"}, "by bitsandbytes, not by hqq"),
        ({"lr_scheduler_type": "polynomial"}, "not polynomial"),
        ({"adam_beta2": 0.95}, "adam_beta2 is 0.999 here"),
        ({"learning_rate": "fast"}, "'fast' is not a number"),
        ({"learning_rate": 7.5}, "less than or equal to 1"),
        ({"val_size": 300}, "a number of rows"),
        ({"adapter_name_or_path": "saves/old"}, "a new adapter"),
        ({"max_steps": 5, "warmup_steps": 9}, "does not end within max_steps"),
    ],
)
def test_what_changes_the_result_and_is_not_taken_is_a_loss(change: dict[str, Any], reason: str) -> None:
    assert re.search(reason, reasons(imported(LLAMA_FACTORY | change)))
    off = dict.fromkeys(change, None)
    assert not re.search(reason, reasons(imported(LLAMA_FACTORY | off)))


def test_rows_of_a_hub_are_named_as_data_train_names_them() -> None:
    assert settings(imported(LLAMA_FACTORY | {"dataset": "hub"}))["data.train"] == ["hf:org/rows:de:test#7"]


def test_a_loss_ends_with_exit_code_2_and_writes_nothing(cli: CLI) -> None:
    path = written(AXOLOTL | {"train_on_inputs": True})
    result = cli("import", path, "-o", "recipe.yaml")
    assert result.exit_code == Exit.USAGE
    assert not Path("recipe.yaml").exists()
    assert "train_on_inputs" in result.stderr
    result = cli("import", path, "-o", "recipe.yaml", "--allow-loss")
    assert result.exit_code == 0
    text = Path("recipe.yaml").read_text()
    assert "# - train_on_inputs: only answers are trained, never prompts" in text
    load_recipe("recipe.yaml", {})


def test_flags_override_the_config_and_a_file_is_kept(cli: CLI) -> None:
    path = written({name: value for name, value in UNSLOTH.items() if name not in ("model", "data")})
    assert "give --model.base" in cli("import", path).stderr
    flags = ("--model.base", "tiny-qwen", "--data.train", "a.jsonl", "--lora.rank", 4)
    assert cli("import", path, "-o", "recipe.yaml", *flags).exit_code == 0
    assert load_recipe("recipe.yaml", {}).lora.rank == 4
    assert "exists already" in cli("import", path, "-o", "recipe.yaml", *flags).stderr


def test_a_recipe_replaces_neither_a_folder_nor_the_config(cli: CLI) -> None:
    path = written(TRL | {"dataset_name": "rows.jsonl"})
    before = path.read_bytes()
    Path("folder").mkdir()
    Path("link.yaml").symlink_to(path)
    for place, told in (("folder", "is a folder"), (path, "the config itself"), ("link.yaml", "the config itself")):
        result = cli("import", path, "-o", place, "--overwrite")
        assert (result.exit_code, path.read_bytes()) == (Exit.USAGE, before)
        assert told in result.stderr


def test_json_has_the_lists_and_the_recipe(cli: CLI) -> None:
    result = cli("import", written(LLAMA_FACTORY), "--json")
    found = json.loads(result.stdout)
    assert found["tool"] == "LLaMA-Factory"
    assert found["recipe"] == imported(LLAMA_FACTORY).text
    named = {
        name for kind in ("taken", "changed", "lost", "unneeded") for entry in found[kind] for name in entry["names"]
    }
    assert named == set(LLAMA_FACTORY)


def unaccounted(tool: Tool, values: dict[str, Any]) -> set[str]:
    """Names of a config that no list has."""
    path = Path("config.json")
    path.write_text(json.dumps(values))
    sheet = translate(path, tool, {}, None, None).sheet
    listed = (*sheet.taken, *sheet.changed, *sheet.lost, *sheet.unneeded)
    return set(tool.unfolded(values)) - {name for entry in listed for name in entry.names}


@pytest.mark.parametrize("name", ["unsloth", "trl"])
def test_another_tool_s_name_of_the_method_is_a_loss(name: str) -> None:
    """The method decides what else is taken, so a name that is read last must not change it."""
    found = translate(written({"tuner_type": "full", "load_in_4bit": True}), TOOLS[name], {}, None, None)
    assert ("tuner_type",) in [entry.names for entry in found.lost]
    assert not read_yaml(found.text).problems


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_no_setting_is_lost_in_silence_and_no_value_ends_in_a_crash(tool: Tool) -> None:
    chance = random.Random(0)
    junk = [0, -1, 3, 1e308, 10**30, True, False, "no", "x,y", "\n# x", "\x07\u2028x", {"a": 1}, [[]], [{}], [None, 3],
            "nan", "auto", "zero3", "a/b:c#5", "(q|k),v", "full",
            [{"path": "a/b", "type": {}}], {"roles": 5}]  # fmt: skip
    names = sorted(tool.names | tool.marks | {"unheard_of"})
    for _ in range(60):
        values = {chance.choice(names): chance.choice(junk) for _ in range(12)}
        assert not unaccounted(tool, values)
        assert not read_yaml(translate(Path("config.json"), tool, {}, None, None).text).problems


def test_a_setting_that_a_rule_forgets_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    tool = TOOLS["llama-factory"]
    assert not unaccounted(tool, LLAMA_FACTORY)
    monkeypatch.setattr(Sheet, "take", lambda *_, **__: None)
    told = itertools.count()
    monkeypatch.setattr(Sheet, "_count", lambda _: next(told))  # as if each rule had told what it does
    assert unaccounted(tool, LLAMA_FACTORY) >= {"model_name_or_path", "lora_target", "warmup_ratio"}


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("base_model: !!python/object/apply:os.system ['touch planted']\n", "c.yaml", "the tag"),
        ("a: &x [1]\nb: *x\n", "c.yaml", "aliases"),
        ("a: 1\na: 2\n", "c.yaml", "already given on line 1"),
        ('{"a": ' * 60 + "1" + "}" * 60, "c.json", "nested deeper than 20"),
        ('{"a": "\\ud800"}', "c.json", "surrogate"),
        ("- a\n", "c.yaml", "no settings"),
        ("echo hello\n", "c.sh", "no training command"),
    ],
)
def test_files_that_are_no_safe_config_are_refused(text: str, name: str, message: str) -> None:
    with pytest.raises(LoratuneError, match=message) as refused:
        read_config(written(text, name))
    assert refused.value.exit_code == Exit.USAGE
    assert not Path("planted").exists()


def test_a_file_that_is_too_large_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    path = written("base_model: x\n" + "# comment\n" * 20)
    read_config(path)
    monkeypatch.setattr(config_file, "MOST_BYTES", 100)
    with pytest.raises(LoratuneError, match="at most 100 are read"):
        read_config(path)


def conversation(row: dict[str, Any]) -> Conversation:
    return Conversation(tuple(row["messages"]))


def test_the_form_of_llama_factory_trains_the_line_break_after_an_answer() -> None:
    """The expected ids are put together by hand from the template's text."""
    tokenizer = load_tokenizer(find_tokenizer(ModelSettings(base="tiny-qwen")))
    ids, labels = CHATML(tokenizer, {}, conversation(ROWS[1]))
    text = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\nThree?<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
    )
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == "2<|im_end|>\n3<|im_end|>\n"
    alpaca = LLAMA_FACTORY_FORMS["alpaca"](tokenizer, {}, conversation(ROWS[0]))[0]
    assert tokenizer.decode(alpaca) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\nHi\n\n### Response:\nHello{tokenizer.eos_token}\n\n"
    )


def test_the_form_of_llama_factory_without_thinking_leaves_reasoning_out() -> None:
    """As 0.9.5 encodes such a row: an empty block that is not trained takes its place."""
    tokenizer = load_tokenizer(find_tokenizer(ModelSettings(base="tiny-qwen")))
    asked = {"role": "user", "content": "Two?"}
    row = {"messages": [asked, {"role": "assistant", "content": "<think>\n1+1\n</think>\n\n2"}]}
    for thinks, trained in ((False, "2<|im_end|>\n"), (True, "<think>\n1+1\n</think>\n\n2<|im_end|>\n")):
        form = form_of("LLaMA-Factory", {"template": "qwen3", "enable_thinking": thinks}, tokenizer)
        assert form is not None
        ids, labels = form(tokenizer, {}, conversation(row))
        assert tokenizer.decode([label for label in labels if label != IGNORED]) == trained
        assert ("<think>\n\n</think>\n\n2" in tokenizer.decode(ids)) != thinks


def test_a_script_is_split_into_words_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = list[str]()

    def counted(text: str) -> ShellCommand | None:
        read.append(text)
        return read_command(text)

    monkeypatch.setattr(config_file, "read_command", counted)
    for name in ("train", "train.sh"):
        path = tmp_path / name
        path.write_text("#!/bin/bash\nswift sft --model a/b --dataset rows.jsonl\n")
        assert read_config(path).values == {"model": "a/b", "dataset": "rows.jsonl"}
    assert len(read) == 2
    (tmp_path / "train").write_text("#!/bin/bash\necho nothing\n")
    with pytest.raises(LoratuneError, match="no training command"):
        read_config(tmp_path / "train")


MARKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML that marks answers with the token that ends them, as loratune trains them."""


def based_on(template: str, **values: Any) -> dict[str, Any]:
    """Values of a TRL config of the practice model with another template and the rows of rows.jsonl."""
    base = Path("base").absolute()
    shutil.copytree(find_tokenizer(ModelSettings(base="tiny-qwen")), base, dirs_exist_ok=True)
    (base / "chat_template.jinja").write_text(template)
    return TRL | {"dataset_name": "rows.jsonl", "model_name_or_path": str(base)} | values


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "3, of course."},
]
COMPLETED = {"prompt": TALK[:-1], "completion": TALK[-1:]}


@pytest.mark.parametrize(
    ("template", "row", "options", "trained"),
    [
        ("qwen2_5", {"messages": TALK}, {"assistant_only_loss": True}, "\n2<|im_end|>\n\n3, of course.<|im_end|>\n"),
        ("qwen2_5", {"messages": TALK}, {}, None),
        ("marking", {"messages": TALK}, {"assistant_only_loss": True}, "2<|im_end|>3, of course.<|im_end|>"),
        ("qwen2_5", COMPLETED, {}, "3, of course.<|im_end|>\n"),
        ("qwen2_5", COMPLETED, {"completion_only_loss": False}, None),
        ("marking", COMPLETED, {"assistant_only_loss": True}, "3, of course.<|im_end|>"),
    ],
)
def test_rows_are_rendered_as_trl_s_trainer_prepares_them(
    template: str, row: dict[str, Any], options: dict[str, Any], trained: str | None
) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from trl.chat_template_utils import qwen2_5_chat_template

    values = based_on(MARKING if template == "marking" else qwen2_5_chat_template)
    config = SFTConfig("trained", report_to="none", use_cpu=True, bf16=False, **options)
    trainer = SFTTrainer(values["model_name_or_path"], args=config, train_dataset=Dataset.from_list([row]))
    prepared = trainer.train_dataset[0]
    tokenizer = load_tokenizer(find_tokenizer(ModelSettings(base=values["model_name_or_path"])))
    form = form_of("TRL", options, tokenizer)
    assert form is not None
    spoken = ConversationReader(detect_format([row], {}), {}, {}).read(row)
    assert isinstance(spoken, Conversation)
    ids, labels = form(tokenizer, row, spoken)
    assert (ids, labels) == (prepared["input_ids"], prepared["labels"])
    assert trained is None or tokenizer.decode([label for label in labels if label != IGNORED]) == trained


def test_line_breaks_that_trl_trains_around_an_answer_are_told() -> None:
    from trl.chat_template_utils import qwen2_5_chat_template

    Path("rows.jsonl").write_text(json.dumps({"messages": TALK}))
    (row,) = compare_rows(imported(based_on(qwen2_5_chat_template)), 1).rows
    assert (row.trained_there - row.trained_here, len(row.differences)) == (4, 4)
    assert any("line breaks" in entry.reason for entry in imported(TRL).sheet.changed)
    (row,) = compare_rows(imported(TRL | {"dataset_name": "rows.jsonl"}), 1).rows
    assert row.problem.startswith("TRL refuses it: The chat template is not training-compatible")
    elsewhere = imported(TRL | {"dataset_name": "rows.jsonl", "chat_template_path": "marking.jinja"})
    assert compare_rows(elsewhere, 1).problem == "TRL's form of these rows is not known here"


def test_rows_are_compared_token_by_token(cli: CLI, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    same = compare_rows(imported(based_on(MARKING)), 5)
    assert [row.is_same for row in same.rows] == [True, True], same.lines
    described = {"rows": {"file_name": "../rows.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}}}
    described["rows"]["tags"] = DATA_SETS["talk"]["tags"]
    (Path("data") / "dataset_info.json").write_text(json.dumps(described))
    Path("rows.jsonl").write_text(json.dumps({"messages": ROWS[1]["messages"][:3]}))
    values = LLAMA_FACTORY | {"dataset": "rows"}
    other = json.loads(cli("import", written(values), "--rows", 1, "--json").stdout)["rows"]["rows"]
    (difference,) = other[0]["differences"]
    assert (difference["there"], difference["here"]) == ("'\\n' (trained)", "nothing")
    assert other[0]["trained_there"] == other[0]["trained_here"] + 1
    assert difference["part"] == "after the end"
    told = compare_rows(imported(values), 1)
    assert told.lines[-1].startswith("1 row differs only in blanks after the end token")

    plain = Encoder.encode

    def also_training_prompts(*arguments: Any, **options: Any) -> list[Example]:
        return [Example(one.input_ids, one.input_ids) for one in plain(*arguments, **options)]

    monkeypatch.setattr(Encoder, "encode", also_training_prompts)
    wrong = compare_rows(imported(based_on(MARKING)), 5)
    assert [row.is_same for row in wrong.rows] == [False]


@pytest.mark.parametrize(
    ("planted", "part", "told"),
    [
        (
            lambda ids, labels: ([ids[0], *ids], [IGNORED, *labels]),
            "prompt",
            "1 row differs in text that is not trained",
        ),
        (
            lambda ids, labels: ([*ids, ids[0]], [*labels, ids[0]]),
            "trained",
            "1 row differs in what is trained, so that",
        ),
        (lambda ids, labels: (ids, labels), None, "1 of 1 row has equal ids and labels"),
    ],
)
def test_where_rows_differ_and_what_that_changes_is_told(
    monkeypatch: pytest.MonkeyPatch, planted: Callable[..., Any], part: str | None, told: str
) -> None:
    Path("rows.jsonl").write_text(json.dumps(ROWS[0]))
    found = imported(based_on(MARKING))
    monkeypatch.setattr(
        "loratune.migration.comparison.form_of", lambda *about: lambda *row: planted(*form_of(*about)(*row))
    )
    compared = compare_rows(found, 1)
    assert compared.rows[0].part == part
    assert told in compared.lines[-1]


def test_trl_trains_whole_conversations_unless_told_otherwise() -> None:
    Path("rows.jsonl").write_text(json.dumps(ROWS[0]))
    found = imported(TRL | {"dataset_name": "rows.jsonl", "assistant_only_loss": False})
    assert any("questions of conversations" in entry.reason for entry in found.sheet.changed)
    (row,) = compare_rows(found, 1).rows
    assert row.trained_there == row.tokens_there > row.trained_here
    assert row.part == "trained"


def test_rows_that_cannot_be_compared_say_why(cli: CLI) -> None:
    Path("rows.jsonl").write_text(json.dumps(ROWS[0]))
    values = {"model": "tiny-qwen", "tuner_type": "lora", "dataset": "rows.jsonl", "template": "glm4", "max_length": 64}
    result = cli("import", written(values), "--rows", 2, "-o", "recipe.yaml")
    assert result.exit_code == 0
    assert "rows are not compared: ms-swift's form of these rows is not known here" in " ".join(result.stderr.split())
    found = imported(TRL | {"dataset_name": "rows.jsonl", "model_name_or_path": "./nowhere"})
    assert "no such folder" in compare_rows(found, 1).problem
    tokenizer = load_tokenizer(find_tokenizer(ModelSettings(base="tiny-qwen")))
    with pytest.raises(ValueError, match="it has tools"):
        WholeTemplate("answers")(tokenizer, {}, Conversation(tuple(ROWS[0]["messages"]), tools=({"type": "function"},)))
