"""ms-swift: the args.json of a run, a `swift sft` or `megatron sft` command, or its YAML; names of 3.x and 4.x."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from loratune.migration.rows import HUB_ID, Rows, add_named, is_file_name, validation
from loratune.migration.rules_of_models import MODEL_RULES, tokenizers_template, trains_base
from loratune.migration.rules_of_training import ROWS, TRAINING_DEFAULTS, TRAINING_RULES
from loratune.migration.rules_of_training import rows_per_step as rows_over_devices
from loratune.migration.sheet import Sheet, is_off, number, truth, whole
from loratune.migration.tool import Tool

Given = Mapping[str, Any]
DATA_SET = re.compile(
    r"(?:(?P<hub>HF|MS)::)?(?P<name>[^:#]+)(?::(?P<subsets>[^#]+))?(?:#(?P<count>\d+))?", re.IGNORECASE
)
TURNS_TRAINED = {"default": "all", "last_round": "last"}
TRUNCATION = {"delete": "drop", "raise": "refuse", "left": "truncate_prompt", "right": "truncate_answer"}
NO_LIMIT = 8192
USUAL_ROWS = 16
OWN_TEMPLATES = ("default", "dummy")
MARKS = (
    "tuner_type train_type model_author loss_scale agent_template split_dataset_ratio use_hf attn_impl freeze_vit "
    "freeze_aligner freeze_llm cached_dataset add_non_thinking_prefix load_from_cache_file "
    "quant_bits tensor_model_parallel_size swift_version ENV"
)


def train_rows(sheet: Sheet, given: Given) -> None:
    rows = _rows(given.get("dataset"), "ms" if not _is_hugging_face(sheet.known) else "hf")
    if columns := given.get("columns"):
        try:
            mapped = json.loads(columns) if isinstance(columns, str) else columns
        except (ValueError, RecursionError):
            raise ValueError("the columns are not a JSON object") from None
        own = {"query": "instruction", "response": "output"}
        rows.map_columns({own.get(str(known), str(known)): str(column) for column, known in mapped.items()}, "columns")
    rows.put(sheet, "data.train")


def _is_hugging_face(known: Given) -> bool:
    return not is_off(known.get("use_hf", False))


def validation_rows(sheet: Sheet, given: Given) -> None:
    if named := given.get("val_dataset"):
        _rows(named, "ms" if not _is_hugging_face(sheet.known) else "hf").put(sheet, "data.validation")
    if "data.validation" not in sheet.recipe:
        validation(sheet, number(given.get("split_dataset_ratio", 0)), "split_dataset_ratio")


def _rows(named: Any, hub: str) -> Rows:
    """Return the rows of `[HF::|MS::]name[:subset][#count]` entries."""
    rows = Rows()
    for entry in [] if named is None else named if isinstance(named, list) else [named]:
        found = DATA_SET.fullmatch(str(entry))
        if not found:
            rows.problems.append(f"{entry}: neither a file of rows nor a data set")
            continue
        count = int(found["count"]) if found["count"] else None
        if is_file_name(found["name"]) or not HUB_ID.fullmatch(found["name"]) or not found["subsets"]:
            add_named(rows, (found["hub"] or hub).lower(), found["name"], count)
            continue
        for subset in found["subsets"].split("/"):
            rows.add_hub((found["hub"] or hub).lower(), found["name"], subset, None, count)
    return rows


def rows_per_step(sheet: Sheet, given: Given) -> None:
    """Without an accumulation, a step has 16 rows, or those of all devices if they are more."""
    if sheet.context.devices is None and "global_world_size" in given:
        sheet.context = replace(sheet.context, devices=whole(given["global_world_size"]))
    if "gradient_accumulation_steps" not in given and "global_batch_size" not in given:
        at_once = whole(given["per_device_train_batch_size"]) * (sheet.context.devices or 1)
        given = {**given, "global_batch_size": max(USUAL_ROWS, at_once)}
    rows_over_devices(sheet, given)


def base(sheet: Sheet, given: Given) -> None:
    """Its models come from ModelScope unless use_hf is set."""
    name = str(given.get("model_name_or_path", ""))
    if not name:
        return
    sheet.take("model.base", name)
    if HUB_ID.fullmatch(name) and not _is_hugging_face(given):
        sheet.take("model.hub", "modelscope")


def rate(sheet: Sheet, given: Given) -> None:
    """The rate by default depends on what is trained."""
    usual = 1e-5 if trains_base(sheet) else 1e-4
    sheet.take("training.learning_rate", number(given["learning_rate"] or usual))


def placeholders(sheet: Sheet, given: Given) -> None:
    """The rows of self-cognition have {{NAME}} and {{AUTHOR}}, in Chinese and English."""
    for name, setting in (("model_name", "name"), ("model_author", "author")):
        value = given.get(name)
        forms = [str(one) for one in (value if isinstance(value, list) else [value]) if one is not None]
        if not forms:
            continue
        filled = sheet.recipe.get("data.placeholders", {}) | {setting: forms[0]}
        if len(forms) > 1:
            how = f"there, {name} has a Chinese and an English form; here it is {forms[0]}"
            sheet.change("data.placeholders", filled, how)
        else:
            sheet.take("data.placeholders", filled)


def trained_turns(sheet: Sheet, given: Given) -> None:
    named = str(given["loss_scale"])
    if named in TURNS_TRAINED:
        sheet.take("data.train_on_turns", TURNS_TRAINED[named])
    elif named == "ignore_empty_think":
        sheet.note("an empty block of reasoning is part of the prompt here, so that it is never trained")
    else:
        sheet.lose(f"tokens have a weight of 1 or 0 here, and not those of {named}")


def longest(sheet: Sheet, given: Given) -> None:
    strategy = str(given.get("truncation_strategy", "delete"))
    if strategy not in TRUNCATION:
        sheet.lose(f"rows that are too long are dropped or truncated, and not given to {strategy}")
    else:
        sheet.take("data.truncation_strategy", TRUNCATION[strategy])
    if "max_length" in given:
        sheet.take("training.max_length", whole(given["max_length"]))
    else:
        sheet.change("training.max_length", NO_LIMIT, "there, the longest row is as long as the model takes")


def template(sheet: Sheet, given: Given) -> None:
    named = str(given.get("template", ""))
    if named in OWN_TEMPLATES:
        sheet.lose(f"loratune has the templates chat, alpaca and plain; the form of {named} is none of them")
    elif named:
        tokenizers_template(sheet, named)
    if system := given.get("system"):
        sheet.take("prompt.system", str(system))
    if "enable_thinking" in given:
        sheet.take("prompt.enable_thinking", truth(given["enable_thinking"]))
    if not is_off(given.get("add_non_thinking_prefix", False)):
        sheet.note("the block that says no reasoning is part of the prompt here, where the template has one")


def task(sheet: Sheet, given: Given) -> None:
    """The command tells the task too: `swift pt` trains on plain text."""
    if sheet.context.program.endswith(" pt"):
        sheet.fail("plain text is not trained on, only answers to questions (the command pt)")
    if given["task_type"] != "causal_lm":
        sheet.lose(f"loratune trains answers to questions, not {given['task_type']}")


def streamed(sheet: Sheet, given: Given) -> None:
    if not is_off(given["streaming"]):
        sheet.skip("rows are kept in files, and never in memory as a whole")


def tools(sheet: Sheet, given: Given) -> None:
    sheet.note("tools and their calls are written by the tokenizer's own template here")


def plain_text(sheet: Sheet, given: Given) -> None:
    if is_off(given["use_chat_template"]):
        sheet.lose("plain text is not trained on, only answers to questions")


SWIFT = Tool(
    "ms-swift",
    marks=frozenset(MARKS.split()),
    programs=frozenset({"swift", "swift pt", "megatron", "megatron pt"}),
    aliases={
        "model": "model_name_or_path",
        "model_id_or_path": "model_name_or_path",
        "model_revision": "revision",
        "tuner_type": "finetuning_type",
        "train_type": "finetuning_type",
        "sft_type": "finetuning_type",
        "lora_dropout_p": "lora_dropout",
        "target_modules": "lora_target",
        "target_parameters": "lora_target_parameters",
        "lora_target_modules": "lora_target",
        "lr": "learning_rate",
        "micro_batch_size": "per_device_train_batch_size",
        "lr_warmup_fraction": "warmup_ratio",
        "lr_warmup_iters": "warmup_steps",
        "lr_decay_style": "lr_scheduler_type",
        "train_iters": "max_steps",
        "max_epochs": "num_train_epochs",
        "clip_grad": "max_grad_norm",
        "optimizer": "optim",
        "early_stop_interval": "early_stopping_patience",
        "adam_eps": "adam_epsilon",
    },
    defaults={
        **TRAINING_DEFAULTS,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "lora_target": "all-linear",
        "per_device_train_batch_size": 1,
        "learning_rate": None,
        "num_train_epochs": 3,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.0,
        "weight_decay": 0.1,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "split_dataset_ratio": 0.0,
        "task_type": "causal_lm",
        "truncation_strategy": "delete",
        "optim": "adamw_torch_fused",
    },
    rules={
        ("dataset", "columns"): train_rows,
        ("val_dataset", "split_dataset_ratio"): validation_rows,
        ("model_name_or_path", "use_hf"): base,
        ("model_name", "model_author"): placeholders,
        ("loss_scale",): trained_turns,
        ("max_length", "truncation_strategy"): longest,
        ("template", "template_type", "system", "enable_thinking", "add_non_thinking_prefix"): template,
        ("task_type",): task,
        ("streaming",): streamed,
        ("agent_template",): tools,
        ("use_chat_template",): plain_text,
        ("ENV", "env"): lambda sheet, given: sheet.skip("variables are set where sft is started"),
        ("eval_dataset",): lambda sheet, given: sheet.skip("no part of training; see infer"),
        **{names: rule for names, rule in MODEL_RULES.items() if names != ("model_name_or_path",)},
        **{names: rule for names, rule in TRAINING_RULES.items() if names not in (ROWS, ("do_train",))},
        ("do_train",): lambda sheet, given: sheet.skip("the command: loratune sft"),
        (*ROWS, "global_world_size"): rows_per_step,
        ("learning_rate",): rate,
    },
    is_dump=lambda values: "swift_version" in values or ("model_info" in values and "model_meta" in values),
)
