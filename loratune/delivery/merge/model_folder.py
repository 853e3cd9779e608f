"""Writes a merged model's other files: copies of the base's, with changes from training and merging."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from loratune.data.encoding.encoder import Encoder
from loratune.delivery.merge.merged_weights import MergePlan
from loratune.delivery.template import write_portable_template
from loratune.model.architecture.structure import text_value, with_text_values
from loratune.model.files import CONFIG, GENERATION_CONFIG
from loratune.model.stop_tokens import stop_ids
from loratune.plain_files import read_json_object
from loratune.runs.opening import AdapterSource
from loratune.runs.tokenizer_files import copy_tokenizer_files
from loratune.writing import write_json

PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
"""How images, videos and sounds are read, by models that read them."""


def write_model_files(
    source: AdapterSource, encoder: Encoder, base: Path, folder: Path, dtype: torch.dtype | None, plan: MergePlan
) -> list[str]:
    """Write config, tokenizer, template and generation config.

    Args:
        source: the adapter and, for a run, the tokenizer of its training.
        encoder: renders prompts as in training.
        base: the base's folder.
        folder: folder of the merged weights.
        dtype: dtype of the merged weights, if not the base's.
        plan: plan of the merged weights.

    Returns:
        The differences from the base's files, for the user.
    """
    changes = _write_config(base, folder, dtype, plan)
    copy_tokenizer_files(source.tokenizer_folder(base), folder)
    for path in copied_files(base):
        shutil.copyfile(path, folder / path.name)
    if write_portable_template(encoder, folder):
        changes.append(
            "chat_template.jinja: the training's prompt settings, so that other programs render the same prompts"
        )
    return changes + _write_generation_config(base, folder, encoder.end_id)


def copied_files(base: Path) -> list[Path]:
    """Return the files of a base that a merged model gets as they are, besides those of its tokenizer."""
    paths = [*base.glob("LICENSE*"), *base.glob("NOTICE*"), *(base / name for name in PROCESSOR_FILES)]
    return [path for path in paths if path.is_file()]


def _write_config(base: Path, folder: Path, dtype: torch.dtype | None, plan: MergePlan) -> list[str]:
    config = read_json_object(base / CONFIG)
    wanted: dict[str, Any] = {"vocab_size": plan.vocabulary}
    if dtype is not None:
        said = [key for key in ("dtype", "torch_dtype") if text_value(config, key) is not None] or ["dtype"]
        wanted |= dict.fromkeys(said, str(dtype).removeprefix("torch."))
    if text_value(config, "tie_word_embeddings") and not plan.is_tied:
        wanted["tie_word_embeddings"] = False
    changes = {key: value for key, value in wanted.items() if with_text_values(config, {key: value}) != config}
    if changes:
        write_json(folder / CONFIG, with_text_values(config, changes))
    else:
        shutil.copyfile(base / CONFIG, folder / CONFIG)
    return [f"{CONFIG}: {key} {json.dumps(value)}" for key, value in changes.items()]


def _write_generation_config(base: Path, folder: Path, end_id: int) -> list[str]:
    """Write the base's generation config, with the end token of trained answers added to the end tokens.

    Raises:
        LoratuneError: the base's config has values that are invalid for sampling or as end tokens.
    """
    from loratune.model.config import load_generation_config  # takes transformers, which takes seconds

    load_generation_config(base)
    path = base / GENERATION_CONFIG
    values = read_json_object(path) if path.is_file() else {}
    ends = stop_ids(base)
    if end_id in ends:
        if path.is_file():
            shutil.copyfile(path, folder / GENERATION_CONFIG)
        return []
    write_json(folder / GENERATION_CONFIG, values | {"eos_token_id": [end_id, *ends]})
    return [f"{GENERATION_CONFIG}: token {end_id} ends an answer, as in training"]
