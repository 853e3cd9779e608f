"""An adapter's two files, read and checked without PEFT: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from loratune.errors import Exit, LoratuneError

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
# Keys through which PEFT has imported modules named in a config file (peft#3085), or that need code to run.
FORBIDDEN_KEYS = ("auto_mapping", "megatron_config", "runtime_config", "eva_config", "corda_config")


def read_config_values(folder: Path) -> dict[str, Any]:
    """The values of an adapter's config, checked before PEFT sees them.

    Raises:
        LoratuneError: there is none, it is not LoRA, it names code, or a value is not of its kind.
    """
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LoratuneError(f"{folder}: no {CONFIG_FILE} in it, so it is not an adapter", Exit.MODEL) from error
    except (OSError, ValueError) as error:
        raise LoratuneError(f"{path}: cannot be read: {error}", Exit.MODEL) from error
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        raise LoratuneError(f"{path}: not a LoRA adapter", Exit.MODEL)
    forbidden = [key for key in FORBIDDEN_KEYS if values.get(key)]
    if forbidden:
        raise LoratuneError(f"{path}: sets {', '.join(forbidden)}, which is not allowed", Exit.MODEL)
    for key, (is_right, rule) in RULES.items():
        if key in values and not is_right(values[key]):
            raise LoratuneError(f"{path}: {key} is {json.dumps(values[key])}; {rule}", Exit.MODEL)
    return values


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


NUMBERS, PATTERNS, NAMES = "r and lora_alpha must be numbers", "it must give names their numbers", "it must be names"
# What PEFT takes as it is, and fails on later, in places that don't say where it came from.
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (lambda value: _is_number(value) and isinstance(value, int), NUMBERS),
    "lora_alpha": (_is_number, NUMBERS),
    "rank_pattern": (_is_pattern, PATTERNS),
    "alpha_pattern": (_is_pattern, PATTERNS),
    "target_modules": (_is_names, NAMES),
    "modules_to_save": (_is_names, NAMES),
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
