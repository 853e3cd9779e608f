"""unsloth: the YAML of its command line and Studio, in sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratune.migration.config_file import is_empty
from loratune.migration.rows import Rows, add_named
from loratune.migration.rules_of_models import MODEL_RULES
from loratune.migration.rules_of_training import TRAINING_DEFAULTS, TRAINING_RULES, cut_off, every
from loratune.migration.sheet import Sheet, is_off, truth
from loratune.migration.tool import Tool

Given = Mapping[str, Any]
SECTIONS = ("data", "training", "lora", "logging", "inference")
READ_FORMATS = ("auto", "alpaca", "chatml", "sharegpt")


def train_rows(sheet: Sheet, given: Given) -> None:
    rows = Rows()
    for name in ("dataset", "local_dataset"):
        for one in given[name] if isinstance(given.get(name), list) else [given[name]] if given.get(name) else []:
            add_named(rows, "hf", str(one))
    if str(given.get("format_type", "auto")) not in READ_FORMATS:
        rows.problems.append(f"rows of the format {given['format_type']} are not read")
    rows.put(sheet, "data.train")


def prompts_trained(sheet: Sheet, given: Given) -> None:
    if not truth(given["train_on_completions"]):
        sheet.lose("only answers are trained, never prompts (train_on_completions: false trains both)")


def parts(sheet: Sheet, given: Given) -> None:
    """Which modules of a model with parts for images are adapted; here the language model's alone."""
    if is_off(given.get("finetune_language_layers", True)):
        sheet.lose("the language model is what is trained")
    elif any(name in given and is_off(given[name]) for name in ("finetune_attention_modules", "finetune_mlp_modules")):
        groups = {"attention": "finetune_attention_modules", "mlp": "finetune_mlp_modules"}
        sheet.take(
            "lora.target_modules", [group for group, name in groups.items() if not is_off(given.get(name, True))]
        )
    elif not is_off(given.get("finetune_vision_layers", False)):
        sheet.note("of a model that reads images, the language model alone is adapted here")


def no_validation(sheet: Sheet, given: Given) -> None:
    """It has no validation rows of its own in a config."""
    sheet.take("data.validation", 0.0)
    every(sheet, "evaluation.every_steps", given.get("eval_steps"))


def one_level(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= value if name in SECTIONS and isinstance(value, dict) else {name: value}
    return {name: value for name, value in flat.items() if not is_empty(value)}


UNSLOTH = Tool(
    "unsloth",
    marks=frozenset(SECTIONS),
    aliases={
        "model": "model_name_or_path",
        "training_type": "finetuning_type",
        "lora_r": "lora_rank",
        "target_modules": "lora_target",
        "max_seq_length": "cutoff_len",
        "batch_size": "per_device_train_batch_size",
        "num_epochs": "num_train_epochs",
        "log_frequency": "logging_steps",
    },
    defaults={
        **TRAINING_DEFAULTS,
        "finetuning_type": "lora",
        "lora_rank": 64,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "learning_rate": 2e-4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "num_train_epochs": 3,
        "warmup_steps": 5,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.01,
        "optim": "adamw_8bit",
        "random_seed": 3407,
        "cutoff_len": 2048,
        "load_in_4bit": True,
        "train_on_completions": False,
        "data.validation": 0.0,
        "lora_target": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
    },
    rules={
        ("dataset", "local_dataset", "format_type"): train_rows,
        ("data.validation", "eval_steps"): no_validation,
        ("train_on_completions",): prompts_trained,
        ("cutoff_len",): cut_off,
        **MODEL_RULES,
        (
            "finetune_vision_layers",
            "finetune_language_layers",
            "finetune_attention_modules",
            "finetune_mlp_modules",
        ): parts,
        **{names: rule for names, rule in TRAINING_RULES.items() if "eval_steps" not in names},
    },
    unfolded=one_level,
)
