"""Exports an adapter as a folder for sharing: everything that PEFT and servers load, without local paths."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from loratune import console
from loratune.data.encoding.encoder import Encoder
from loratune.delivery.merge.sources import check_where_possible
from loratune.delivery.template import write_portable_template
from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.model.adapter.completeness import own_modules, tensor_shapes
from loratune.model.adapter.files import CONFIG_FILE, WEIGHTS_FILE, read_config_values
from loratune.model.adapter.other_layouts import in_peft_layout
from loratune.model.adapter.patterns import with_current_patterns
from loratune.model.adapter.renaming import renamed_config, renamed_tensors
from loratune.model.architecture.served_class import ServedClass
from loratune.model.tokenizer import load_tokenizer
from loratune.runs.card import base_name, write_card, write_plain_card
from loratune.runs.folder import file_sha256
from loratune.runs.opening import AdapterSource
from loratune.runs.tokenizer_files import TOKENIZER_CONFIG, VOCABULARY_FILES, copy_tokenizer_files
from loratune.safetensors_header import header_text
from loratune.writing import write_json

# Settings that PEFT writes even if the feature that they belong to is disabled.
IDLE_SETTINGS = {"megatron_core": "megatron_config", "qalora_group_size": "use_qalora"}


def export_adapter(
    source: AdapterSource,
    folder: Path,
    model: str | None = None,
    force: bool = False,
    served: ServedClass | None = None,
    model_class: str | None = None,
) -> bool:
    """Write an adapter, its tokenizer's files and its model card, and verify them.

    Weights and tokenizer are copied byte for byte, except for the names of tensors if the class of `served` has
    others, and the chat template if it has to include the training's prompt settings, which other programs would not
    know. A checkpoint has no tokenizer, so only its adapter is exported.

    Args:
        source: the adapter.
        folder: an existing empty folder.
        model: location of the base, if moved.
        force: accept a different base.
        served: the class whose names it gets; None keeps the names of the training.
        model_class: name of the class for the card, if the base has several.

    Returns:
        Whether the chat template differs from the base's.

    Raises:
        LoratuneError: the adapter is incomplete, damaged or not LoRA, or one of its files contains a local path.
    """
    for warning in check_where_possible(source, model, force):
        console.warn(warning)
    files = in_peft_layout(source.adapter, served.trained_shapes) if served else source.adapter
    shapes = tensor_shapes(files)
    config = with_current_patterns(read_config_values(files), own_modules(shapes), source.adapter)
    base_folder = _base_folder(source)
    config["base_model_name_or_path"] = _public_base(source, config, base_folder)
    names = None
    # SGLang reads no expressions, and vLLM only simple ones.
    if served is not None and (served.has_own_names or isinstance(config.get("target_modules"), str)):
        config = renamed_config(config, served.trained_shapes, served.parameters, source.adapter)
        names = renamed_tensors(shapes, served.modules, source.adapter)
        tensors = load_file(files / WEIGHTS_FILE)
        save_file({names[name]: values for name, values in tensors.items()}, folder / WEIGHTS_FILE, {"format": "pt"})
    else:
        shutil.copyfile(files / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    write_json(folder / CONFIG_FILE, _cleaned(config))
    copy_tokenizer_files(source.adapter, folder)
    has_own_template = (folder / TOKENIZER_CONFIG).is_file() and write_portable_template(
        Encoder(load_tokenizer(folder), source.prompt), folder
    )
    if source.record:
        write_card(folder, source.record, base_folder, model_class)
    else:
        write_plain_card(folder, source.adapter.absolute().name, config, model_class)
    _check(source, files, folder, names)
    return has_own_template


def _base_folder(source: AdapterSource) -> str | None:
    """Return the folder of the base in training, if that distinguishes a local folder from a download."""
    is_modelscope = source.record is not None and source.record.model.hub == "modelscope"
    if source.manifest is None or is_modelscope:  # its downloads are in …/org/name, like local folders
        return None
    return source.trained_base.path


def _public_base(source: AdapterSource, config: dict[str, Any], base_folder: str | None) -> str | None:
    named = source.record.model.base if source.record else config.get("base_model_name_or_path")
    return base_name(str(named), base_folder) if named else None


def _cleaned(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config for inference without disabled settings, whose names other PEFT versions may not know."""
    kept = {
        key: value
        for key, value in config.items()
        if key == "init_lora_weights" or not (value is None or value is False or value in ({}, []))
    }
    for idle in [name for name, switch in IDLE_SETTINGS.items() if not config.get(switch)]:
        kept.pop(idle, None)
    if isinstance(kept.get("target_modules"), list):
        kept["target_modules"] = sorted(kept["target_modules"])
    return kept | {"inference_mode": True}


def _check(source: AdapterSource, files: Path, folder: Path, names: dict[str, str] | None) -> None:
    """Read the export back.

    Args:
        source: the adapter.
        files: a folder with it in PEFT's layout.
        folder: the export.
        names: tensor name → its name in the export; None if the file was copied.

    Raises:
        LoratuneError: a file contains a local path.
        RuntimeError: config or weights differ from the adapter's.
    """
    config, original = read_config_values(folder), read_config_values(files)
    if any(config.get(key) != original.get(key) for key in ("r", "lora_alpha", "lora_dropout")):
        raise RuntimeError(f"{folder / CONFIG_FILE} is not that of {source.adapter}")
    if not _has_weights(files / WEIGHTS_FILE, folder / WEIGHTS_FILE, names):
        raise RuntimeError(f"{folder / WEIGHTS_FILE} is not that of {source.adapter}")
    found = [
        f"{name}: {path}"
        for name, text in _texts(folder)
        for path in _local_paths(source)
        if path.encode() in text or json.dumps(path)[1:-1].encode() in text
    ]
    if found:
        forced = " with --force, since the run is then changed" if source.run else ""
        raise LoratuneError(
            f"{source.adapter}: not exported, since files of it name local paths:\n{bullet_list(found)}\n"
            f"take them out there, then export again{forced}",
            Exit.MODEL,
        )


def _has_weights(original: Path, written: Path, names: dict[str, str] | None) -> bool:
    """Return whether a file has the bytes of another one, or its tensors under other names."""
    if names is None:
        return file_sha256(original) == file_sha256(written)
    wanted, found = load_file(original), load_file(written)
    return {*names.values()} == found.keys() and all(
        values.dtype == found[names[name]].dtype and torch.equal(values, found[names[name]])
        for name, values in wanted.items()
    )


def _texts(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the contents that may include a path: all files except vocabularies, and the header of the weights."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.name == WEIGHTS_FILE:
            yield path.name, header_text(path)
        elif path.name not in VOCABULARY_FILES:  # in which `/root` is a token
            yield path.name, path.read_bytes()


def _local_paths(source: AdapterSource) -> list[str]:
    """Return absolute paths that would reveal the locations of user, run, base and data."""
    places = [Path.home(), source.run or source.adapter]
    places += [Path(source.trained_base.path)] if source.manifest else []
    if source.record:
        places += [Path(name.rpartition("#")[0] or name).expanduser() for name in source.record.paths]
    return sorted({str(place.absolute()) for place in places if len(place.absolute().parts) > 1})
