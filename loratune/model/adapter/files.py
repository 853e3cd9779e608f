"""Reads and validates adapter_config.json without PEFT."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.plain_files import CONFIG_BYTES, read_json_object

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

# Settings that loading and merging implement identically.
SETTINGS = {
    "alpha_pattern", "bias", "ensure_weight_tying", "exclude_modules", "layers_pattern", "layers_to_transform",
    "lora_alpha", "lora_bias", "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules",
    "target_parameters", "task_type", "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip
# Settings that only affect training, or document provenance. PEFT itself resets fan_in_fan_out for linear layers, and
# ignores the settings of an initialisation (corda_config …) that init_lora_weights does not select.
OTHER_SETTINGS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "merge_weights",
    "peft_version", "qalora_group_size", "revision", "runtime_config",
}  # fmt: skip
# Not even passed on: PEFT has imported modules named in these (peft#3085), or they name files of another machine.
DROPPED_SETTINGS = {
    "auto_mapping", "corda_config", "eva_config", "fan_in_fan_out", "lora_ga_config", "merge_weights", "runtime_config",
}  # fmt: skip
# Initialisations that leave the base unchanged. The others change it in a way that the adapter's file does not record.
PLAIN_STARTS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
MOST_PATTERNS, LONGEST_PATTERN = 4_096, 20_000
"""Maximum number of names or expressions in a setting, and length of each: a 120-layer model has 840 LoRA modules."""
HIGHEST_RANK, HIGHEST_ALPHA, MOST_LAYERS, HIGHEST_TOKEN = 65_536, 1_000_000, 10_000, 100_000_000
NEEDED = ("r", "lora_alpha")
NAME = re.compile(r"[\w.-]+")
LONGEST_SHOWN = 120


def read_config_values(folder: Path) -> dict[str, Any]:
    """Return the validated values of an adapter's config; keys without effect are dropped.

    Raises:
        LoratuneError: there is no config, it is not LoRA, it names code, a value is invalid, or a setting affects the
            adapter's result in a way that loratune does not implement.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        raise LoratuneError(f"{folder}: no {CONFIG_FILE} in it, so it is not an adapter", Exit.MODEL)
    values = read_json_object(path, CONFIG_BYTES)
    if values.get("peft_type") != "LORA":
        raise LoratuneError(f"{path}: not a LoRA adapter", Exit.MODEL)
    problems = [
        f"{key} is {_shortened(values.get(key))}; {rule}"
        for key, (is_right, rule) in RULES.items()
        if (key in values or key in NEEDED) and not is_right(values.get(key))
    ]
    problems += [problem for problem in (_code_problem(values), _start_problem(values)) if problem]
    unknown = sorted(key for key, value in values.items() if value and key not in SETTINGS | OTHER_SETTINGS)
    problems += [
        f"{key} is set, which loratune does not implement; without it the adapter would compute something else"
        for key in unknown
        if key != "megatron_config"
    ]
    if problems:
        several = len(problems) > 1
        raise LoratuneError(f"{path}: " + (f"\n{bullet_list(problems)}" if several else problems[0]), Exit.MODEL)
    return {key: value for key, value in values.items() if key not in DROPPED_SETTINGS}


def _code_problem(values: dict[str, Any]) -> str | None:
    """Return a problem if a config names code.

    auto_mapping of transformers' own classes, which PEFT writes, is allowed.
    """
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
    """Return a problem if the initialisation changed the base before training."""
    start = values.get("init_lora_weights")
    name = str(start).lower()
    if start is None or name in PLAIN_STARTS:
        return None
    if not name.startswith(CHANGED_BASE):
        return f"init_lora_weights is {json.dumps(start)}, which is unknown to loratune"
    return (
        f"trained with init_lora_weights {start}, which changes the base before training and does not save the change. "
        "Convert it to plain LoRA where it was trained (PEFT's save_pretrained with "
        "path_initial_model_for_weight_conversion), or let PEFT merge it (merge_and_unload) and give the merged model"
    )


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}… ({len(text):,} characters)"


def _is_integer(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_rank(value: Any) -> bool:
    return _is_integer(value, 1, HIGHEST_RANK)


def _is_alpha(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and 0 <= value <= HIGHEST_ALPHA  # False for NaN


def _is_whole_alpha(value: Any) -> bool:
    return _is_alpha(value) and value > 0


def _is_pattern(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_PATTERN


def _is_name(value: Any) -> bool:
    return _is_pattern(value) and NAME.fullmatch(value) is not None


def _is_list(value: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) <= MOST_PATTERNS and all(map(is_right, value))


def _is_names_or_pattern(value: Any) -> bool:
    return value is None or _is_pattern(value) or _is_list(value, _is_name)


def _is_names(value: Any) -> bool:
    return value is None or _is_name(value) or _is_list(value, _is_name)


def _is_patterns(value: Any) -> bool:
    return value is None or _is_pattern(value) or _is_list(value, _is_pattern)


def _is_layers(value: Any) -> bool:
    return value is None or _is_layer(value) or _is_list(value, _is_layer)


def _is_layer(value: Any) -> bool:
    return _is_integer(value, 0, MOST_LAYERS)


def _gives(value: Any, is_right: Callable[[Any], bool]) -> bool:
    """Return whether a value maps names or expressions to valid numbers."""
    is_some = isinstance(value, dict) and len(value) <= MOST_PATTERNS
    return value is None or (is_some and all(_is_pattern(key) and is_right(number) for key, number in value.items()))


def _is_indices(value: Any) -> bool:
    """Return whether a value selects tokens: a list of ids, or one list per module."""
    lists = list(value.values()) if isinstance(value, dict) else [] if value is None else [value]
    return all(isinstance(ids, list) and all(_is_integer(id_, 0, HIGHEST_TOKEN) for id_ in ids) for ids in lists)


NAMES = f"it must be names of modules, at most {MOST_PATTERNS:,}"
EXPRESSION = f"at most {LONGEST_PATTERN:,} characters"
PATTERNS = f"it must be an expression of {EXPRESSION}, or names of modules, at most {MOST_PATTERNS:,}"
RANK = f"a rank is a whole number from 1 to {HIGHEST_RANK:,}"
ALPHA = f"an alpha is a number from 0 to {HIGHEST_ALPHA:,}"
GIVEN = f"to at most {MOST_PATTERNS:,} names or expressions of {EXPRESSION}"
SWITCH = "it must be true or false"
# Values that PEFT accepts, and that would fail later without naming their source.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, RANK),
    "lora_alpha": (_is_whole_alpha, f"{ALPHA}, and not 0, which disables the adapter"),
    "bias": (lambda value: value in (None, "none", "all", "lora_only"), "it must be none, all or lora_only"),
    "rank_pattern": (lambda value: _gives(value, _is_rank), f"{RANK}, given {GIVEN}"),
    "alpha_pattern": (lambda value: _gives(value, _is_alpha), f"{ALPHA}, given {GIVEN}"),
    "target_modules": (_is_names_or_pattern, PATTERNS),
    "exclude_modules": (_is_names_or_pattern, PATTERNS),
    "target_parameters": (_is_names, f"it must be names of parameters, at most {MOST_PATTERNS:,}"),
    "layers_pattern": (_is_patterns, PATTERNS),
    "layers_to_transform": (_is_layers, f"it must be numbers of layers, from 0 to {MOST_LAYERS:,}"),
    "modules_to_save": (_is_names, NAMES),
    "trainable_token_indices": (_is_indices, "it must be ids of tokens"),
    "task_type": (
        lambda value: value in (None, "CAUSAL_LM"),
        "only adapters of language models (CAUSAL_LM) are supported",
    ),
    "megatron_core": (
        lambda value: value in (None, "megatron.core"),
        "it names code, and nothing that an adapter names is imported",
    ),
    **{
        key: (lambda value: value is None or isinstance(value, bool), SWITCH)
        for key in ("use_dora", "use_rslora", "lora_bias", "ensure_weight_tying")
    },
}
