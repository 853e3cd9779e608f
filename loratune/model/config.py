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
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig, PreTrainedConfig
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from loratune.choices import Dtype
from loratune.errors import Exit, LoratuneError, bullet_list, reason_of
from loratune.model.architecture.structure import text_values, with_text_values
from loratune.model.files import CONFIG, GENERATION_CONFIG, check_values
from loratune.plain_files import CONFIG_BYTES, read_json_object
from loratune.protocols import CausalModel, ModelConfig

# Of the keys that all config classes share; the others change a model's outputs, or belong to classifiers.
COMMON_KEYS = {"architectures", "dtype", "torch_dtype", "transformers_version"}
# Older names of rope_parameters, which config classes with RoPE still accept.
ROPE_KEYS = {"rope_theta", "rope_scaling", "partial_rotary_factor"}
# These would change the computation; loratune implements them for the architectures that set them by themselves.
FOREIGN_KEYS = ("per_layer_config", "fusion_config")
DTYPES = get_args(Dtype)
# What loratune and its proof read of a generation config.
SAMPLING_KEYS = {
    "do_sample": bool, "temperature": float, "top_p": float, "top_k": int, "min_p": float, "repetition_penalty": float,
}  # fmt: skip
KINDS = {bool: "true or false", int: "a whole number from 0 on", float: "a number from 0 on"}
TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
ADVICE = "fetch the file again, or correct it"
READ = re.compile(r"\bconfig\.([a-z]\w*)|getattr\((?:self\.)?config, \"([a-z]\w*)\"")
TAKEN = re.compile(r"kwargs\.(?:pop|get)\(\"([a-z]\w*)\"|\"([a-z]\w*)\" (?:not )?in kwargs")


def load_config(folder: Path, is_quantized: bool = False) -> ModelConfig:
    """The config of a model folder, of the class that its model_type has in transformers.

    Args:
        folder: model folder.
        is_quantized: whether loratune has quantised the weights; transformers then needs quantization_config.

    Raises:
        LoratuneError: the config is unreadable, asks for code, or has values that no model can be built from.
    """
    path = folder / CONFIG
    kind, values = _described(path)
    allowed = allowed_keys(kind) | ({"quantization_config"} if is_quantized else set())
    kept = {key: _with_floats(value) for key, value in values.items() if key in allowed}
    parts = {name: kept[name] for name in CONFIG_MAPPING[kind].sub_configs if isinstance(kept.get(name), dict)}
    for name, part in parts.items():
        own = allowed_keys(kind, name, part.get("model_type"))
        kept[name] = {key: value for key, value in part.items() if key in own}
    described = [kept, text_values(kept)] if text_values(kept) is not kept else [kept]
    problems = [
        f"{key} is set, which is not implemented" for key in FOREIGN_KEYS if values.get(key) and key not in kept
    ]
    problems += [
        f"{key} is {_shown(value)}"
        for one in described
        for key, value in one.items()
        if key not in parts and _is_impossible(key, value)
    ]
    dtype = kept.get("dtype", kept.get("torch_dtype"))
    problems += [f"dtype is {_shown(dtype)}; {', '.join(DTYPES)} are supported"] if dtype not in (None, *DTYPES) else []
    if problems:
        raise LoratuneError(f"{path}:\n{bullet_list(problems)}\n{ADVICE}", Exit.MODEL)
    return _built(path, kept, CONFIG_MAPPING[kind])


def default_config(folder: Path) -> ModelConfig:
    """The config of a model folder's architecture with default values: what a tokenizer's class follows from.

    Raises:
        LoratuneError: the config is unreadable, asks for code, or transformers does not have the architecture.
    """
    kind, _ = _described(folder / CONFIG)
    config: ModelConfig = CONFIG_MAPPING[kind]()
    return config


def _described(path: Path) -> tuple[str, dict[str, Any]]:
    """Return model_type and all values of a config.json."""
    values = read_json_object(path, CONFIG_BYTES)
    check_values(path, values)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise LoratuneError(f"{path}: transformers has no model_type {_shown(kind)}", Exit.MODEL)
    return kind, values


def empty_model(config: ModelConfig, auto: Any = None) -> CausalModel:
    """A causal language model of a config's sizes that takes no memory.

    Args:
        config: the config.
        auto: transformers' class that makes it; by default that of `auto_class`.

    Raises:
        Exception: of any type, if no model can be built from the config.
    """
    # Drawing starting values of nothing is most of the work otherwise: torch takes it apart in Python on "meta".
    with torch.device("meta"), no_init_weights():
        model: CausalModel = (auto or auto_class(type(config))).from_config(config)
    return model


def auto_class(config_class: Any) -> Any:
    """Return transformers' class that loads the language model of a config: alone where it can be, else with the whole.

    Raises:
        LoratuneError: transformers has no such class, as for a model that writes no text.
    """
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if config_class in auto._model_mapping:
            return auto
    raise LoratuneError(f"transformers has no model that writes text for {config_class.__name__}", Exit.MODEL)


@functools.cache
def allowed_keys(model_type: str, part: str = "", part_type: str | None = None) -> frozenset[str]:
    """Return the keys that an architecture's config class declares or takes, or that its own code reads.

    Args:
        model_type: of the whole config.
        part: name of a config within it, such as `text_config`.
        part_type: model_type that the part states.
    """
    whole = CONFIG_MAPPING[model_type]
    config_class = whole.sub_configs[part] if part else whole
    if part_type in CONFIG_MAPPING and not issubclass(config_class, PreTrainedConfig):
        config_class = CONFIG_MAPPING[part_type]
    if not issubclass(config_class, PreTrainedConfig):
        return frozenset({"model_type"})  # which transformers will refuse
    declared = {field.name for field in fields(config_class)} - {field.name for field in fields(PreTrainedConfig)}
    found = _names(TAKEN, inspect.getsource(config_class))
    with contextlib.suppress(LoratuneError):
        found |= _names(READ, inspect.getsource(sys.modules[auto_class(whole)._model_mapping[whole].__module__]))
    parts = {"model_type"} if part else set(whole.sub_configs)
    own = {key for key in found if not hasattr(PreTrainedConfig, key) and not key.endswith("_config")}
    found = own | (found & {*FOREIGN_KEYS}) | parts
    aliases = {*config_class.attribute_map, *config_class.attribute_map.values()}
    return frozenset(declared | found | aliases | COMMON_KEYS | ROPE_KEYS)


def _names(pattern: re.Pattern[str], source: str) -> set[str]:
    return {name for groups in pattern.findall(source) for name in groups if name}


def _with_floats(value: Any) -> Any:
    """Return a value with the infinite numbers that transformers writes as {"__float__": "Infinity"}."""
    return PreTrainedConfig._decode_special_floats(value)


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
    for kind in sorted({*(text_values(values).get("layer_types") or ())} - {"full_attention"}):
        if not _can_have_two_layers(config_class, values):
            return  # another setting has one value per layer
        layers = _two_layers(config_class, values, kind)
        with torch.no_grad(), contextlib.suppress(RuntimeError):  # a step that looks at values, which meta has none of
            layers(input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta"))


def _can_have_two_layers(config_class: Any, values: dict[str, Any]) -> bool:
    try:
        _two_layers(config_class, values, "full_attention")
    except (ValueError, StrictDataclassError):  # the latter where the class requires another kind of layer
        return False
    return True


def _two_layers(config_class: Any, values: dict[str, Any], kind: str) -> CausalModel:
    """A model without values: a layer of a kind, and one that attends, where transformers' caches count tokens."""
    layers = {"num_hidden_layers": 2, "layer_types": [kind, "full_attention"]}
    return empty_model(config_class(**with_text_values(values, layers)))


def _is_buildable(config_class: Any, keys: Iterable[str], values: dict[str, Any]) -> bool:
    """Return whether a model can be built from a subset of the values; used to find the bad one."""
    try:
        _tried(config_class, {key: values[key] for key in keys})
    except Exception:
        return False
    return True


def _is_impossible(key: str, value: Any) -> bool:
    """Return whether a number is outside the range that its key implies.

    Token ids may be -1 for none, and the layer whose states stand for an image is counted from the end.
    """
    numbers = [part for part in _parts(value) if isinstance(part, int | float)]
    if key.endswith(("_token_id", "_feature_layer")):
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
