"""An adapter's two files, read and checked without PEFT: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.plain_files import read_plain_text, reason_of

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

# Settings that loading and merging carry out, each in the same way.
SETTINGS = {
    "alpha_pattern", "bias", "ensure_weight_tying", "exclude_modules", "layers_pattern", "layers_to_transform",
    "lora_alpha", "lora_bias", "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "task_type",
    "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip
# What matters in training alone, or says where things came from. PEFT itself takes fan_in_fan_out back for linear
# layers, and ignores the settings of a start (corda_config …) that init_lora_weights does not name.
OTHER_SETTINGS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "merge_weights",
    "peft_version", "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip
# Not even passed on: PEFT has imported modules that these name (peft#3085), or they name files of another machine.
DROPPED_SETTINGS = {
    "auto_mapping", "corda_config", "eva_config", "fan_in_fan_out", "lora_ga_config", "merge_weights", "runtime_config",
}  # fmt: skip
# Starts that leave the base as it is. The others take something out of it that the adapter's file does not say.
PLAIN_STARTS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


def read_config_values(folder: Path) -> dict[str, Any]:
    """The values of an adapter's config, checked before PEFT sees them; keys that nothing needs are left out.

    Raises:
        LoratuneError: there is none, it is not LoRA, it names code, a value is not of its kind, or a setting changes
            what the adapter computes in a way that loratune does not carry out.
    """
    path = folder / CONFIG_FILE
    try:
        values = json.loads(read_plain_text(path))
    except FileNotFoundError as error:
        raise LoratuneError(f"{folder}: no {CONFIG_FILE} in it, so it is not an adapter", Exit.MODEL) from error
    except (OSError, ValueError, RecursionError) as error:
        raise LoratuneError(f"{path}: cannot be read: {reason_of(error)}", Exit.MODEL) from error
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        raise LoratuneError(f"{path}: not a LoRA adapter", Exit.MODEL)
    problems = [
        f"{key} is {json.dumps(values[key])}; {rule}"
        for key, (is_right, rule) in RULES.items()
        if key in values and not is_right(values[key])
    ]
    problems += [problem for problem in (_code_problem(values), _start_problem(values)) if problem]
    unknown = sorted(key for key, value in values.items() if value and key not in SETTINGS | OTHER_SETTINGS)
    problems += [
        f"{key} is set, which loratune does not carry out; without it the adapter would compute something else"
        for key in unknown
        if key != "megatron_config"
    ]
    if problems:
        several = len(problems) > 1
        raise LoratuneError(f"{path}: " + (f"\n{bullet_list(problems)}" if several else problems[0]), Exit.MODEL)
    return {key: value for key, value in values.items() if key not in DROPPED_SETTINGS}


def _code_problem(values: dict[str, Any]) -> str | None:
    """Whether a config asks for code: auto_mapping of transformers' own classes, which PEFT writes, does not."""
    if values.get("megatron_config"):
        return "megatron_config is set, which needs code of Megatron to run; nothing that an adapter names is imported"
    mapping = values.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else mapping
    if library and (not isinstance(library, str) or library.partition(".")[0] not in ("transformers", "peft")):
        return (
            f"auto_mapping names code outside of transformers ({json.dumps(library)}); nothing that an adapter names "
            "is imported"
        )
    return None


def _start_problem(values: dict[str, Any]) -> str | None:
    """Whether the adapter belongs to another base than the one that was given to its training."""
    start = values.get("init_lora_weights")
    name = str(start).lower()
    if start is None or name in PLAIN_STARTS:
        return None
    if not name.startswith(CHANGED_BASE):
        return f"init_lora_weights is {json.dumps(start)}, which loratune does not know"
    return (
        f"trained with init_lora_weights {start}, which changes the base before training and does not save the change. "
        "Convert it to plain LoRA where it was trained (PEFT's save_pretrained with "
        "path_initial_model_for_weight_conversion), or let PEFT merge it (merge_and_unload) and give the merged model"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_names(value: Any) -> bool:
    return value is None or isinstance(value, str) or (isinstance(value, list) and all(map(_is_name, value)))


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_pattern(value: Any) -> bool:
    """Whether a value gives regular expressions of module names their ranks or alphas."""
    if not isinstance(value, dict) or not all(map(_is_number, value.values())):
        return value is None
    try:
        return all(re.compile(pattern) for pattern in value)
    except re.error:
        return False


def _is_indices(value: Any) -> bool:
    """Whether a value names tokens: a list of ids, or one for each module."""
    lists = list(value.values()) if isinstance(value, dict) else [] if value is None else [value]
    return all(
        isinstance(ids, list) and all(isinstance(id_, int) and not isinstance(id_, bool) and id_ >= 0 for id_ in ids)
        for ids in lists
    )


NUMBERS, PATTERNS, NAMES = "r and lora_alpha must be numbers", "it must give names their numbers", "it must be names"
# What PEFT takes as it is, and fails on later, in places that don't say where it came from.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (lambda value: _is_number(value) and isinstance(value, int), NUMBERS),
    "lora_alpha": (_is_number, NUMBERS),
    "bias": (lambda value: value in (None, "none", "all", "lora_only"), "it must be none, all or lora_only"),
    "rank_pattern": (_is_pattern, PATTERNS),
    "alpha_pattern": (_is_pattern, PATTERNS),
    "target_modules": (_is_names, NAMES),
    "modules_to_save": (_is_names, NAMES),
    "trainable_token_indices": (_is_indices, "it must be ids of tokens"),
}


def by_pattern(patterns: dict[str, float] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name ends in, as PEFT finds it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def check_weights(folder: Path) -> None:
    """Make sure that an adapter's tensors can be read and are finite.

    Raises:
        LoratuneError: the file is missing, damaged, or holds NaN.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = " (only pickled weights, which are never opened)" if (folder / "adapter_model.bin").exists() else ""
        raise LoratuneError(f"{folder}: no {WEIGHTS_FILE} in it{pickled}", Exit.MODEL)
    try:
        with safe_open(path, framework="pt") as file:
            broken = [name for name in file.keys() if not file.get_tensor(name).isfinite().all()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise LoratuneError(f"{path}: damaged: {error}", Exit.MODEL) from error
    if broken:
        raise LoratuneError(f"{path}: holds NaN or infinity in {len(broken)} tensors, first {broken[0]}", Exit.MODEL)
