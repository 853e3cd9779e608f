"""Filters the configs of a model folder before transformers reads them: only keys of the architecture pass.

transformers sets every key of a config.json as an attribute, and reads some of them to select attention kernels (which
it would download from the hub), weight files, adapters and code. Here a config is data: a key passes if the
architecture's config class declares it or the architecture's own code reads it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from loratune.choices import Dtype
from loratune.errors import Exit, LoratuneError, bullet_list, reason_of
from loratune.model.architecture.structure import text_values
from loratune.model.files import CONFIG, check_values
from loratune.plain_files import CONFIG_BYTES, read_json_object
from loratune.protocols import CausalModel, ModelConfig

GENERATION_CONFIG = "generation_config.json"
# Of the keys that all config classes share; the others change a model's outputs, or belong to classifiers.
COMMON_KEYS = {"architectures", "dtype", "torch_dtype", "transformers_version"}
# Older names of rope_parameters, which config classes with RoPE still accept.
ROPE_KEYS = {"rope_theta", "rope_scaling", "partial_rotary_factor"}
DTYPES = get_args(Dtype)
# What loratune and its proof read of a generation config.
SAMPLING_KEYS = {
    "do_sample": bool, "temperature": float, "top_p": float, "top_k": int, "min_p": float, "repetition_penalty": float,
}  # fmt: skip
KINDS = {bool: "true or false", int: "a whole number from 0 on", float: "a number from 0 on"}
TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
ADVICE = "fetch the file again, or correct it"
READ = re.compile(r"\bconfig\.([a-z]\w*)|getattr\((?:self\.)?config, \"([a-z]\w*)\"")


def load_config(folder: Path, is_quantized: bool = False) -> ModelConfig:
    """The config of a model folder, of the class that its model_type has in transformers.

    Args:
        folder: model folder.
        is_quantized: whether loratune has quantised the weights; transformers then needs quantization_config.

    Raises:
        LoratuneError: the config is unreadable, asks for code, or has values that no model can be built from.
    """
    path = folder / CONFIG
    values = read_json_object(path, CONFIG_BYTES)
    check_values(path, values)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise LoratuneError(f"{path}: transformers has no model_type {_shown(kind)}", Exit.MODEL)
    allowed = allowed_keys(kind) | ({"quantization_config"} if is_quantized else set())
    kept = {key: value for key, value in values.items() if key in allowed}
    problems = [f"{key} is {_shown(value)}" for key, value in kept.items() if _is_impossible(key, value)]
    dtype = kept.get("dtype", kept.get("torch_dtype"))
    problems += [f"dtype is {_shown(dtype)}; {', '.join(DTYPES)} are supported"] if dtype not in (None, *DTYPES) else []
    if problems:
        raise LoratuneError(f"{path}:\n{bullet_list(problems)}\n{ADVICE}", Exit.MODEL)
    return _built(path, kept, CONFIG_MAPPING[kind])


def empty_model(config: ModelConfig) -> CausalModel:
    """A causal language model of a config's sizes that takes no memory.

    Raises:
        Exception: of any type, if no model can be built from the config.
    """
    # Drawing starting values of nothing is most of the work otherwise: torch takes it apart in Python on "meta".
    with torch.device("meta"), no_init_weights():
        model: CausalModel = AutoModelForCausalLM.from_config(config)
    return model


@functools.cache
def allowed_keys(model_type: str) -> frozenset[str]:
    """Return the keys that an architecture's config class declares, or that its own code reads."""
    config_class = CONFIG_MAPPING[model_type]
    declared = {field.name for field in fields(config_class)} - {field.name for field in fields(PreTrainedConfig)}
    read = set[str]()
    if config_class in AutoModelForCausalLM._model_mapping:
        module = sys.modules[AutoModelForCausalLM._model_mapping[config_class].__module__]
        read = {found for pair in READ.findall(inspect.getsource(module)) for found in pair if found}
        read = {key for key in read if not hasattr(PreTrainedConfig, key)}
    return frozenset(declared | read | set(config_class.attribute_map) | COMMON_KEYS | ROPE_KEYS)


def _built(path: Path, values: dict[str, Any], config_class: Any) -> ModelConfig:
    """A config of checked values.

    Raises:
        LoratuneError: names the keys that transformers rejects.
    """
    transformers_logging.set_verbosity_error()
    try:
        config = _tried(config_class, values)
    except Exception as error:  # transformers and torch raise many types for bad values
        odd = [key for key in values if _is_buildable(config_class, values.keys() - {key}, values)]
        about = "".join(f"{key} {_shown(values[key])}: " for key in odd[:1])
        raise LoratuneError(f"{path}: makes no model: {about}{reason_of(error)}\n{ADVICE}", Exit.MODEL) from error
    return config


def _tried(config_class: Any, values: dict[str, Any]) -> ModelConfig:
    """A config of which a model can be made, and a layer run of each kind that it names: some need more settings.

    Raises:
        Exception: of any type.
    """
    config: ModelConfig = config_class(**values)
    _require_layers(config_class, json.dumps(values))
    return config


@functools.lru_cache(maxsize=8)
def _require_layers(config_class: Any, values_text: str) -> None:
    """Make a model of a config's values, and run a layer of each kind; a command reads the same config many times.

    Raises:
        Exception: of many kinds.
    """
    values = json.loads(values_text)
    empty_model(config_class(**values))
    for kind in sorted({*(values.get("layer_types") or ())} - {"full_attention"}):
        layer = empty_model(config_class(**values | {"num_hidden_layers": 1, "layer_types": [kind]}))
        with torch.no_grad(), contextlib.suppress(RuntimeError):  # a step that looks at values, which meta has none of
            layer(input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta"))


def _is_buildable(config_class: Any, keys: Iterable[str], values: dict[str, Any]) -> bool:
    """Return whether a model can be built from a subset of the values; used to find the bad one."""
    try:
        _tried(config_class, {key: values[key] for key in keys})
    except Exception:
        return False
    return True


def _is_impossible(key: str, value: Any) -> bool:
    """Return whether a number is outside the range that its key implies; token ids may be -1 for none."""
    numbers = [part for part in _parts(value) if isinstance(part, int | float)]
    if key.endswith("_token_id"):
        return False
    most = 1 if key.endswith("dropout") else math.inf
    least = 1 if key == "max_position_embeddings" else 0
    return not all(least <= number <= most for number in numbers)


def _parts(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]


def load_generation_config(folder: Path) -> Any:
    """Load a model's default sampling settings and end tokens, from generation_config.json or config.json.

    Raises:
        LoratuneError: a value has a wrong type or range.
    """
    path = folder / GENERATION_CONFIG
    path = path if path.is_file() else folder / CONFIG
    values = read_json_object(path, CONFIG_BYTES)
    check_values(path, values)
    values |= text_values(values)
    problems = [
        f"{key} is {_shown(values[key])}; it must be {KINDS[kind]}"
        for key, kind in SAMPLING_KEYS.items()
        if values.get(key) is not None and not _is_number(values[key], kind)
    ]
    problems += [
        f"{key} is {_shown(values[key])}; it must be the id of a token"
        for key in TOKEN_KEYS
        if not all(_is_number(one, int) for one in _as_list(values.get(key)))
    ]
    if problems:
        raise LoratuneError(f"{path}:\n{bullet_list(problems)}\n{ADVICE}", Exit.MODEL)
    kept = {key: values[key] for key in (*SAMPLING_KEYS, *TOKEN_KEYS) if values.get(key) is not None}
    return GenerationConfig(**kept)


def _is_number(value: Any, kind: type) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, int if kind is int else int | float) and 0 <= value < float("inf")


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
