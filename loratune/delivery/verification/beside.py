"""Verifies a merged model's files other than the weights: by comparison with their sources, and by loading them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from loratune.data.encoding.encoder import Encoder
from loratune.delivery.merge.model_folder import copied_files
from loratune.delivery.template import portable_template, renders_training_prompts
from loratune.errors import Exit, LoratuneError, bullet_list, reason_of
from loratune.model.architecture.structure import text_value, text_values
from loratune.model.architecture.vocabulary import vocabulary_of
from loratune.model.files import CONFIG, GENERATION_CONFIG, weight_files
from loratune.model.stop_tokens import stop_ids
from loratune.model.weights.tensor_files import INDEX, TensorFiles
from loratune.plain_files import read_json_object
from loratune.runs.folder import VERIFICATION
from loratune.runs.intact import is_loaded
from loratune.runs.tokenizer_files import CHAT_TEMPLATE, NAMED_TEMPLATES, TOKENIZER_CONFIG, tokenizer_files

ALLOWED = ("vocab_size", "tie_word_embeddings", "dtype", "torch_dtype")
"""Keys of the config that a merge may change, each to the value that the written weights imply."""
PLACE = "_name_or_path"
"""transformers' key for the location of a config."""
PROBE = "Who are you? 你是谁？ def f(x):\n\treturn x + 1  # 3.14"


def check_beside(base: Path, tokenizer: Path, encoder: Encoder, folder: Path) -> None:
    """Compare the files next to the weights with their sources, byte by byte and as loaded by the libraries.

    Args:
        base: folder of the base.
        tokenizer: folder of the training's tokenizer.
        encoder: renders prompts as in training, with that tokenizer.
        folder: complete folder of the merged model.

    Raises:
        LoratuneError: lists the files that are missing, unexpected, or different.
    """
    template = portable_template(encoder)
    problems = [*_file_problems(base, tokenizer, folder, template)]
    problems = problems or [*_config_problems(base, folder), *_generation_problems(base, folder, encoder.end_id)]
    problems = problems or [*_loaded_problems(base, folder, encoder)]
    if problems:
        raise LoratuneError(
            f"files beside the merged weights are not what they should be:\n{bullet_list(problems)}", Exit.MODEL
        )


def _file_problems(base: Path, tokenizer: Path, folder: Path, template: str | None) -> Iterator[str]:
    """Yield files that are missing, unexpected, or different from their source."""
    copies = {name: tokenizer / name for name in tokenizer_files(tokenizer)}
    copies |= {path.name: path for path in copied_files(base)}
    if template is not None:
        copies = {name: path for name, path in copies.items() if not name.startswith(NAMED_TEMPLATES)}
        copies.pop(CHAT_TEMPLATE, None)
        config = read_json_object(copies.pop(TOKENIZER_CONFIG))
        config |= {"chat_template": template} if "chat_template" in config else {}
        if _json(folder / TOKENIZER_CONFIG) != config:
            yield f"{TOKENIZER_CONFIG}: not the training's tokenizer's with the template of its prompts"
        if _bytes(folder / CHAT_TEMPLATE) != template.encode():
            yield f"{CHAT_TEMPLATE}: not the template of the training's prompts"
    for name, path in copies.items():
        if _bytes(folder / name) != path.read_bytes():
            yield f"{name}: {'not that of the base' if (folder / name).is_file() else 'missing'}"
    expected = {*copies, TOKENIZER_CONFIG, CONFIG, GENERATION_CONFIG, INDEX, VERIFICATION}
    expected |= {CHAT_TEMPLATE} if template is not None else set()
    expected |= {path.name for path in weight_files(folder)}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and str(path.relative_to(folder)) not in expected and is_loaded(path.name):
            yield f"{path.relative_to(folder)}: left over from something else"


def _config_problems(base: Path, folder: Path) -> Iterator[str]:
    """Keys of config.json that are not the base's, nor what the written weights say."""
    written, original = _by_key(_json(folder / CONFIG)), _by_key(read_json_object(base / CONFIG))
    said = _said_by_weights(folder)
    for key in sorted({*written, *original}):
        value, name = written.get(key), key.rpartition(".")[2]
        if value != original.get(key) and (name not in ALLOWED or value != said[name]):
            yield f"{CONFIG}: {key} is {json.dumps(value)}, and {json.dumps(original.get(key))} in the base"


def _by_key(config: dict[str, Any]) -> dict[str, Any]:
    """A config's values by their names, those of the language model's part under `text_config.`."""
    text = text_values(config)
    if text is config:
        return config
    rest = {key: value for key, value in config.items() if key != "text_config"}
    return rest | {f"text_config.{key}": value for key, value in text.items()}


def _said_by_weights(folder: Path) -> dict[str, Any]:
    infos = TensorFiles(weight_files(folder)).infos
    embedding, head = vocabulary_of(infos)
    dtype = str(infos[embedding].dtype).removeprefix("torch.")
    rows = infos[embedding].shape[0]
    return {"vocab_size": rows, "tie_word_embeddings": head not in infos, "dtype": dtype, "torch_dtype": dtype}


def _generation_problems(base: Path, folder: Path, end_id: int) -> Iterator[str]:
    """Yield keys of generation_config.json that differ from the base's, except for the added end token."""
    written, original = _json(folder / GENERATION_CONFIG), _json(base / GENERATION_CONFIG)
    ends, found = {*stop_ids(base), end_id}, stop_ids(folder)
    if {*found} != ends:
        yield f"{GENERATION_CONFIG}: an answer ends at {found} where it should at {sorted(ends)}"
    for key in sorted({*written, *original} - {"eos_token_id"}):
        if written.get(key) != original.get(key):
            yield f"{GENERATION_CONFIG}: {key} is {json.dumps(written.get(key))}"


def _loaded_problems(base: Path, folder: Path, encoder: Encoder) -> Iterator[str]:
    """Yield differences between folder and base as loaded by the libraries."""
    plain: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        configs = [AutoConfig.from_pretrained(place, **plain).to_dict() for place in (base, folder)]
        tokenizer = AutoTokenizer.from_pretrained(folder, **plain)
        ends = text_value(configs[1], "eos_token_id")
        if (folder / GENERATION_CONFIG).is_file():
            ends = GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
    except Exception as error:  # the libraries know no common class
        yield f"transformers cannot load it: {reason_of(error)}"
        return
    original, found = map(_by_key, configs)
    for key in sorted({*original, *found}):
        if key.rpartition(".")[2] not in (*ALLOWED, PLACE) and original.get(key) != found.get(key):
            yield f"{CONFIG}: transformers reads {key} as {found.get(key)!r}, and {original.get(key)!r} in the base"
    if encoder.end_id not in _ids(ends):
        yield f"{GENERATION_CONFIG}: transformers does not end an answer at token {encoder.end_id}"
    if tokenizer.get_vocab() != encoder.tokenizer.get_vocab():
        yield "the tokenizer has another vocabulary"
    if tokenizer(PROBE).input_ids != encoder.tokenizer(PROBE).input_ids:
        yield "the tokenizer cuts a text into other tokens"
    if not renders_training_prompts(encoder, tokenizer):
        yield "the chat template renders other prompts than the training's"


def _ids(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}
