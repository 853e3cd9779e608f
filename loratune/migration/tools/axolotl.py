"""axolotl: its YAML configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratune.migration.rows import MEDIA, Rows, add_loaded, check_turns, validation
from loratune.migration.rules_of_models import MODEL_RULES, tokenizers_template
from loratune.migration.rules_of_training import TRAINING_DEFAULTS, TRAINING_RULES, prompts_trained
from loratune.migration.sheet import Sheet, is_off, number, texts, whole
from loratune.migration.tool import Tool

Given = Mapping[str, Any]
ALPACA, CHAT = "alpaca", "chat"
TYPES = {"alpaca": ALPACA, "chat_template": CHAT, "sharegpt": CHAT}
"""Type of a source → template that renders it."""
READ = {
    "path",
    "type",
    "name",
    "split",
    "train_on_split",
    "data_files",
    "ds_type",
    "field_messages",
    "roles",
    "message_property_mappings",
    "message_field_role",
    "message_field_content",
    "roles_to_train",
    "train_on_eos",
    "field",
    "chat_template",
    "revision",
    "trust_remote_code",
    "field_instruction",
    "field_output",
    "field_input",
    "field_system",
    "system_prompt",
    "field_thinking",
    "template_thinking_key",
    "conversation",
}
TRUNCATION = {"drop": "drop", "truncate": "truncate_answer", "raise": "refuse"}
HARMLESS_PLUGINS = ("cut_cross_entropy", "liger", "kernels", "expert_parallel", "scattermoe", "spectrum_noop")
BOUNDS = ("pad_token", "bos_token", "eos_token", "unk_token")
MARKS = (
    "base_model micro_batch_size sequence_len sample_packing val_set_size lora_target_linear "
    "num_epochs adapter dataset_prepared_path evals_per_epoch saves_per_epoch lora_modules_to_save eot_tokens "
    "pad_to_sequence_len special_tokens plugins lr_scheduler"
)


def train_rows(sheet: Sheet, given: Given) -> None:
    rows, templates = _rows(given["datasets"])
    rows.put(sheet, "data.train")
    if len(templates) > 1:
        sheet.lose("one template renders all rows here, and not alpaca for some and chat for others")
    elif templates:
        sheet.take("prompt.template", next(iter(templates)))
    if ALPACA in templates:
        sheet.note(
            "there, the input of a row has a heading of its own (### Input:); here it follows the instruction on a "
            "line of its own",
            "prompt.template",
        )


def validation_rows(sheet: Sheet, given: Given) -> None:
    if named := given.get("test_datasets"):
        _rows(named)[0].put(sheet, "data.validation")
    if "data.validation" not in sheet.recipe:
        validation(sheet, number(given.get("val_set_size", 0)), "val_set_size")


def _rows(entries: Any) -> tuple[Rows, set[str]]:
    """Return the rows of a list of sources, and the templates that render them."""
    rows, templates = Rows(), set[str]()
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, dict) or not entry.get("path"):
            rows.problems.append(f"{entry}: a source without a path")
            continue
        name = str(entry["path"])
        if kind := _template_of(rows, name, entry.get("type", "chat_template")):
            templates.add(kind)
        entry = {**entry, **(entry["type"] if isinstance(entry.get("type"), dict) else {})}
        split = entry.get("split", entry.get("train_on_split"))
        add_loaded(rows, name, entry, str(split) if split else None)
        _check_source(rows, name, entry)
    return rows, templates


def _template_of(rows: Rows, name: str, kind: Any) -> str:
    if isinstance(kind, dict):
        if kind.get("format") or kind.get("no_input_format"):
            rows.problems.append(f"{name}: a format of its own; rows are rendered by prompt.template")
        return CHAT
    first = str(kind).split(".")[0].split(":")[0]
    if first not in TYPES or str(kind) not in TYPES:
        rows.problems.append(f"{name}: rows of the type {kind} are not read; alpaca and chat_template are")
        return TYPES.get(first, "")
    return TYPES[first]


def _check_source(rows: Rows, name: str, entry: Given) -> None:
    """Take the columns of a source, and record what of its keys has no meaning here."""
    columns = {
        "instruction": "field_instruction",
        "output": "field_output",
        "input": "field_input",
        "system": "field_system",
    }
    mapped = {known: str(entry[own]) for known, own in columns.items() if entry.get(own)}
    turns = str(entry.get("field_messages") or "messages")
    if turns not in ("messages", "conversations"):
        mapped["messages"] = turns
    rows.map_columns(mapped, name)
    keys = {"role": "role", "content": "content"} | (entry.get("message_property_mappings") or {})
    keys["role"] = entry.get("message_field_role") or keys["role"]
    keys["content"] = entry.get("message_field_content") or keys["content"]
    roles = {str(own): role for role, names in (entry.get("roles") or {}).items() for own in texts(names)}
    check_turns(rows, name, {keys["role"], keys["content"]}, roles)
    if media := [column for column in keys if column in MEDIA]:
        rows.problems.append(f"{name}: turns with {', '.join(media)}; only texts are trained")
    if set(texts(entry.get("roles_to_train") or ["assistant"])) - {"assistant", "gpt"}:
        rows.problems.append(f"{name}: only answers are trained, not the roles {entry['roles_to_train']}")
    if entry.get("train_on_eos") not in (None, "turn", "last"):
        rows.problems.append(f"{name}: the token that ends an answer is always trained, and no other")
    if system := entry.get("system_prompt"):
        rows.notes.append(
            f"{name}: its system prompt is not that of the other sources: {{path: …, system: {system!r}}}"
        )
    for key in sorted(entry.keys() - READ):
        if not is_off(entry[key]) and key not in ("format", "no_input_format"):
            rows.problems.append(f"{name}: {key} has no meaning here")


def template(sheet: Sheet, given: Given) -> None:
    named = str(given.get("chat_template", ""))
    if named and named != "tokenizer_default" and sheet.recipe.get("prompt.template") != ALPACA:
        tokenizers_template(sheet, named)
    if system := given.get("default_system_message"):
        sheet.take("prompt.system", str(system))


def longest(sheet: Sheet, given: Given) -> None:
    strategy = str(given.get("excess_length_strategy", "drop"))
    sheet.take("data.truncation_strategy", TRUNCATION.get(strategy, strategy))
    sheet.take("training.max_length", whole(given["cutoff_len"]))


def tokens(sheet: Sheet, given: Given) -> None:
    """Padding is never trained or seen; other tokens are those of the tokenizer."""
    named = given.get("special_tokens") or {}
    odd = [str(name) for name in named if name not in BOUNDS] if isinstance(named, dict) else [str(named)]
    if odd:
        sheet.lose("control tokens are those of the tokenizer; none is added")
    elif set(named) - {"pad_token"}:
        sheet.note("the tokens that begin a text and end an answer are those of the tokenizer and its template")
    else:
        sheet.skip("padding is never trained or seen, and an answer ends as the template ends it")


def plugins(sheet: Sheet, given: Given) -> None:
    odd = [one for one in texts(given["plugins"]) if not any(part in one.lower() for part in HARMLESS_PLUGINS)]
    if odd:
        sheet.lose(f"no plugin is run: {', '.join(odd)}")
    else:
        sheet.skip("its plugins are kernels, which are chosen by the device here")


def experts(sheet: Sheet, given: Given) -> None:
    if not is_off(given["quantize_moe_experts"]):
        sheet.skip("a base in nf4 has the experts' matrices in 4 bits too")


def deduplicated(sheet: Sheet, given: Given) -> None:
    if not is_off(given["dataset_exact_deduplication"]):
        sheet.take("data.remove", ["duplicates"])


def parts(sheet: Sheet, given: Given) -> None:
    sheet.lose("expressions for parameters are not those for modules; give --method freeze and --freeze.modules")


def one_level(values: dict[str, Any]) -> dict[str, Any]:
    """Bring the options of bitsandbytes to the level of the others."""
    inner = values.get("bnb_config_kwargs")
    if not isinstance(inner, dict):
        return dict(values)
    return {name: value for name, value in values.items() if name != "bnb_config_kwargs"} | inner


AXOLOTL = Tool(
    "axolotl",
    marks=frozenset(MARKS.split()),
    aliases={
        "base_model": "model_name_or_path",
        "revision_of_model": "revision",
        "adapter": "finetuning_type",
        "lora_r": "lora_rank",
        "lora_target_modules": "lora_target",
        "lora_modules_to_save": "modules_to_save",
        "peft_layers_to_transform": "layers_to_transform",
        "sequence_len": "cutoff_len",
        "sample_packing": "packing",
        "micro_batch_size": "per_device_train_batch_size",
        "batch_size": "global_batch_size",
        "num_epochs": "num_train_epochs",
        "lr_scheduler": "lr_scheduler_type",
        "optimizer": "optim",
        "adam_eps": "adam_epsilon",
        "evaluation_strategy": "eval_strategy",
        "wandb_name": "run_name",
        "swanlab_experiment_name": "run_name",
    },
    defaults={
        **TRAINING_DEFAULTS,
        "finetuning_type": "full",
        "lora_rank": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1.0,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.03,
        "val_set_size": 0.0,
        "optim": "adamw_torch_fused",
        "cutoff_len": 512,
    },
    rules={
        ("datasets",): train_rows,
        ("test_datasets", "val_set_size"): validation_rows,
        ("chat_template", "default_system_message"): template,
        ("cutoff_len", "excess_length_strategy"): longest,
        ("train_on_inputs",): prompts_trained,
        ("special_tokens", "eot_tokens"): tokens,
        ("plugins",): plugins,
        ("quantize_moe_experts",): experts,
        ("unfrozen_parameters",): parts,
        ("dataset_exact_deduplication",): deduplicated,
        **MODEL_RULES,
        **TRAINING_RULES,
    },
    unfolded=one_level,
)
