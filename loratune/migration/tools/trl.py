"""TRL: the YAML of `trl sft`, or its command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratune.migration.rows import Rows, add_loaded
from loratune.migration.rules_of_models import MODEL_RULES
from loratune.migration.rules_of_training import TRAINING_DEFAULTS, TRAINING_RULES, cut_off, every
from loratune.migration.sheet import Sheet, is_off, truth
from loratune.migration.tool import Tool

Given = Mapping[str, Any]
MARKS = (
    "dataset_name dataset_config dataset_train_split dataset_test_split use_peft assistant_only_loss "
    "completion_only_loss packing_strategy chat_template_path eos_token"
)


def train_rows(sheet: Sheet, given: Given) -> None:
    rows = Rows()
    sources = given.get("datasets") or [
        {
            "path": given.get("dataset_name"),
            "name": given.get("dataset_config"),
            "split": given.get("dataset_train_split"),
        }
    ]
    for source in sources if isinstance(sources, list) else []:
        entry = source if isinstance(source, dict) else {"path": source}
        name = str(entry.get("path") or "")
        add_loaded(rows, name, entry, entry.get("split"))
        if entry.get("columns"):
            rows.problems.append(f"{name}: a choice of columns is not read; loratune finds the format by the names")
    rows.put(sheet, "data.train")


def validation_rows(sheet: Sheet, given: Given) -> None:
    """The split for tests is only read if an evaluation is asked for."""
    if not is_off(given.get("eval_strategy", "no")) and sheet.known.get("dataset_name"):
        rows = Rows()
        name, split = str(sheet.known["dataset_name"]), str(given.get("dataset_test_split", "test"))
        rows.add_hub("hf", name, sheet.known.get("dataset_config"), split, None)
        rows.put(sheet, "data.validation")
    else:
        sheet.take("data.validation", 0.0)
    every(sheet, "evaluation.every_steps", given.get("eval_steps"))


def trained_parts(sheet: Sheet, given: Given) -> None:
    """It trains whole conversations unless told otherwise; of prompt and completion, the completion."""
    if truth(given["assistant_only_loss"]):
        sheet.note(
            "there, what TRL's template marks is trained, with some models the line breaks around an answer as well "
            "(import --rows compares them)"
        )
        return
    if truth(given.get("completion_only_loss", False)):
        return
    if "completion_only_loss" in given:
        sheet.lose("only answers are trained, never prompts")
    else:
        sheet.note("there, the questions of conversations (messages) are trained too; here only the answers")


def method(sheet: Sheet, given: Given) -> None:
    if not truth(given["use_peft"]):
        sheet.take("method", "full")


def end_token(sheet: Sheet, given: Given) -> None:
    sheet.skip("an answer ends as the tokenizer's chat template ends it")


TRL = Tool(
    "TRL",
    marks=frozenset(MARKS.split()),
    programs=frozenset({"trl"}),
    aliases={
        "lora_r": "lora_rank",
        "lora_target_modules": "lora_target",
        "lora_modules_to_save": "modules_to_save",
        "max_seq_length": "max_length",
        "use_bnb_nested_quant": "bnb_4bit_use_double_quant",
    },
    defaults={
        **TRAINING_DEFAULTS,
        "use_peft": False,
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "lora_target": "all-linear",
        "learning_rate": 2e-5,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 3,
        "lr_scheduler_type": "linear",
        "max_length": 1024,
        "dataset_train_split": "train",
        "eval_strategy": "no",
        "assistant_only_loss": False,
        "bnb_4bit_use_double_quant": False,
        "optim": "adamw_torch_fused",
    },
    rules={
        ("dataset_name", "dataset_config", "dataset_train_split", "datasets"): train_rows,
        ("eval_strategy", "eval_steps", "dataset_test_split"): validation_rows,
        ("assistant_only_loss", "completion_only_loss"): trained_parts,
        ("use_peft",): method,
        ("max_length",): cut_off,
        ("eos_token",): end_token,
        **{names: rule for names, rule in MODEL_RULES.items() if "finetuning_type" not in names},
        **{names: rule for names, rule in TRAINING_RULES.items() if "eval_steps" not in names},
    },
)
