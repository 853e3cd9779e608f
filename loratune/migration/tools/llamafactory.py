"""LLaMA-Factory: its YAML and JSON configs, of 0.9 and of v1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratune.errors import counted
from loratune.migration.rows import validation
from loratune.migration.rules_of_models import MODEL_RULES, tokenizers_template
from loratune.migration.rules_of_training import TRAINING_DEFAULTS, TRAINING_RULES, prompts_trained
from loratune.migration.sheet import Sheet, is_off, number, texts, truth, whole
from loratune.migration.tool import Tool
from loratune.migration.tools.dataset_info import described_rows

Given = Mapping[str, Any]
OWN_TEMPLATES = {"alpaca": "alpaca", "default": "plain"}
NO_TEMPLATE = ("empty",)
MARKS = (
    "finetuning_type stage cutoff_len dataset_dir lora_target train_dataset dist_config peft_config "
    "kernel_config overwrite_cache sample_backend infer_backend export_dir use_kt"
)
SECTIONS = ("peft_config", "quant_config", "dist_config", "kernel_config", "optim_config")
CUT = (
    "there, rows that are too long are truncated, question and answer in proportion; here they are dropped "
    "(data.truncation_strategy)"
)


def stage(sheet: Sheet, given: Given) -> None:
    if given["stage"] != "sft":
        sheet.lose(f"loratune trains the stage sft, not {given['stage']}")


def train_rows(sheet: Sheet, given: Given) -> None:
    rows = described_rows(sheet, given.get("dataset"), given.get("train_dataset"))
    if not is_off(given.get("max_samples")) and rows.sources:
        count = whole(given["max_samples"])
        rows.sources = [source if "#" in source else f"{source}#{count}" for source in rows.sources]
        rows.notes.append(f"there, the first {counted(count, 'row of each source')}; here as many are drawn")
    rows.put(sheet, "data.train")


def validation_rows(sheet: Sheet, given: Given) -> None:
    size = number(given.get("val_size", 0))
    if named := given.get("eval_dataset"):
        described_rows(sheet, named, None).put(sheet, "data.validation")
        if "data.validation" not in sheet.recipe:
            sheet.take("data.validation", 0.0)
    else:
        validation(sheet, size, "val_size")


def template(sheet: Sheet, given: Given) -> None:
    """Its templates are named; loratune renders by the tokenizer's own, or by one of two of its own."""
    named = str(given.get("template", ""))
    if named in OWN_TEMPLATES:
        how = f"there, {named} trains what follows the end token too, and may break lines otherwise (see import --rows)"
        sheet.change("prompt.template", OWN_TEMPLATES[named], how)
    elif named in NO_TEMPLATE:
        sheet.lose("rows are rendered by a template; see prompt.template")
    elif named:
        tokenizers_template(sheet, named)
    if system := given.get("default_system"):
        sheet.take("prompt.system", str(system))
    thinks = named.startswith("qwen3") and not named.endswith("_nothink")
    if not thinks:
        return
    if truth(given.get("enable_thinking", True)):
        sheet.change(
            "prompt.enable_thinking",
            False,
            "there, an answer without reasoning begins with an empty block that is trained; here the block is part of "
            "the prompt. Set true if the rows hold reasoning",
        )
    else:
        sheet.take("prompt.enable_thinking", False)


def frozen(sheet: Sheet, given: Given) -> None:
    """Its method freeze trains the last layers, or the first if the number is negative."""
    if sheet.recipe.get("method") != "freeze":
        return
    count = whole(given["freeze_trainable_layers"])
    sheet.take("freeze.layers", f"{'last' if count > 0 else 'first'} {abs(count)}")
    modules = [name for name in texts(given.get("freeze_trainable_modules", "all")) if name != "all"]
    extra = texts(given.get("freeze_extra_modules", []))
    if extra and not modules:
        sheet.lose("modules beside whole layers are not trained; give --freeze.modules")
    elif modules:
        sheet.take("freeze.modules", modules + extra)


def longest(sheet: Sheet, given: Given) -> None:
    sheet.change("training.max_length", whole(given["cutoff_len"]), CUT)


def history(sheet: Sheet, given: Given) -> None:
    sheet.take("data.train_on_turns", "last" if truth(given["mask_history"]) else "all")


def hub(sheet: Sheet, given: Given) -> None:
    if not is_off(given["use_modelscope_hub"]):
        sheet.take("model.hub", "modelscope")


def unfolded(values: dict[str, Any]) -> dict[str, Any]:
    """Bring the sections of v1's configs to one level, under the names that 0.9 has."""
    flat = {name: value for name, value in values.items() if name not in SECTIONS or not isinstance(value, dict)}
    names = {
        "peft_config": {"name": "finetuning_type", "r": "lora_rank", "target_modules": "lora_target"},
        "quant_config": {"name": "quantization_method"},
        "optim_config": {"name": "optim", "wd": "weight_decay"},
    }
    for section in SECTIONS:
        inner = values.get(section)
        if not isinstance(inner, dict):
            continue
        if section in ("dist_config", "kernel_config"):
            flat[section] = str(inner.get("name", ""))
            continue
        known = names[section]
        flat |= {known.get(name, str(name)): value for name, value in inner.items() if value is not None}
    if "train_dataset" in values and "peft_config" not in values:
        flat["finetuning_type"] = "full"
    return flat


LLAMA_FACTORY = Tool(
    "LLaMA-Factory",
    marks=frozenset(MARKS.split()),
    aliases={
        "model": "model_name_or_path",
        "micro_batch_size": "per_device_train_batch_size",
        "additional_target": "modules_to_save",
        "dist_config": "fsdp",
    },
    defaults={
        **TRAINING_DEFAULTS,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "freeze_trainable_layers": 2,
        "lora_dropout": 0.0,
        "lora_target": "all",
        "cutoff_len": 2048,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "learning_rate": 5e-5,
        "num_train_epochs": 3.0,
        "lr_scheduler_type": "linear",
        "val_size": 0.0,
        "optim": "adamw_torch",
        "neat_packing": False,
    },
    rules={
        ("stage",): stage,
        ("dataset", "train_dataset", "max_samples", "dataset_dir"): train_rows,
        ("eval_dataset", "val_size"): validation_rows,
        ("template", "default_system", "enable_thinking"): template,
        ("cutoff_len",): longest,
        ("train_on_prompt",): prompts_trained,
        ("mask_history",): history,
        ("use_modelscope_hub",): hub,
        **MODEL_RULES,
        ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules"): frozen,
        **TRAINING_RULES,
    },
    unfolded=unfolded,
)
