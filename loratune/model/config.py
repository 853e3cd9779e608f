"""What of a model folder's configs transformers gets to see: settings of the architecture, and nothing else.

transformers takes every key of a config.json as an attribute of the config, and reads some of them where it chooses
attention kernels (which it would fetch from the hub), files of weights, adapters and code. A config is data here: a key
gets through if the architecture's config class declares it or the architecture's own code reads it.
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
# Of what every config class has in common; the rest changes what a model returns, or is about classifiers.
COMMON_KEYS = {"architectures", "dtype", "torch_dtype", "transformers_version"}
# Earlier names of rope_parameters, which every config class with RoPE still takes.
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
        is_quantized: whether its weights are, by this program; transformers then needs the config's word for how.

    Raises:
        LoratuneError: it cannot be read, asks for code, or holds values that make no model.
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
    problems += [f"dtype is {_shown(dtype)}; {', '.join(DTYPES)} are taken"] if dtype not in (None, *DTYPES) else []
    if problems:
        raise LoratuneError(f"{path}:\n{bullet_list(problems)}\n{ADVICE}", Exit.MODEL)
    return _built(path, kept, CONFIG_MAPPING[kind])


def empty_model(config: ModelConfig) -> CausalModel:
    """A causal language model of a config's sizes that takes no memory.

    Raises:
        Exception: of many kinds, where the config's values make no model.
    """
    # Drawing starting values of nothing is most of the work otherwise: torch takes it apart in Python on "meta".
    with torch.device("meta"), no_init_weights():
        model: CausalModel = AutoModelForCausalLM.from_config(config)
    return model


@functools.cache
def allowed_keys(model_type: str) -> frozenset[str]:
    """The keys that the config class of an architecture declares, or the architecture's own code reads."""
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
        LoratuneError: with the keys that transformers refuses.
    """
    transformers_logging.set_verbosity_error()
    try:
        config = _tried(config_class, values)
    except Exception as error:  # of values, each layer of transformers and torch raises another kind
        odd = [key for key in values if _is_buildable(config_class, values.keys() - {key}, values)]
        about = "".join(f"{key} {_shown(values[key])}: " for key in odd[:1])
        raise LoratuneError(f"{path}: makes no model: {about}{reason_of(error)}\n{ADVICE}", Exit.MODEL) from error
    return config


def _tried(config_class: Any, values: dict[str, Any]) -> ModelConfig:
    """A config of which a model can be made, and a layer run of each kind that it names: some need more settings.

    Raises:
        Exception: of many kinds.
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
    """Whether a model can be made of some of the values, by which the odd ones are found."""
    try:
        _tried(config_class, {key: values[key] for key in keys})
    except Exception:
        return False
    return True


def _is_impossible(key: str, value: Any) -> bool:
    """Whether a number is out of the range that its name leaves it; some configs say -1 for a token that is none."""
    numbers = [part for part in _parts(value) if isinstance(part, int | float)]
    if key.endswith("_token_id"):
        return False
    most = 1 if key.endswith("dropout") else math.inf
    least = 1 if key == "max_position_embeddings" else 0
    return not all(least <= number <= most for number in numbers)


def _parts(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]


def load_generation_config(folder: Path) -> Any:
    """How a model's makers want it to be sampled and ended; from config.json where there is no file for it.

    Raises:
        LoratuneError: a value is not of its kind.
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
