"""Locates and validates the base model's folder; no weights are loaded here."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError, safe_open

from loratune.caches import cache_folder
from loratune.errors import Exit, LoratuneError, bullet_list, hub_reason_of
from loratune.extras import required
from loratune.model.architecture.families import FAMILIES, is_native
from loratune.model.architecture.structure import text_values
from loratune.plain_files import CONFIG_BYTES, is_folder, read_json_object, require_plain_files
from loratune.printable import LONGEST_PATH, shortened
from loratune.recipe.sections import TINY_QWEN, ModelSettings
from loratune.safetensors_header import read_header

# Keys with which libraries have fetched or run code from a model's folder (transformers CVE-2026-4372, vLLM
# CVE-2026-22807, mlx-lm CVE-2026-5843).
CLASSES = "auto_map"
FORBIDDEN_KEYS = (CLASSES, "custom_pipelines", "custom_generate", "kernel_config", "model_file", "trust_remote_code")
# Keys that select an implementation, which the recipe does; transformers would download unknown ones by name.
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
KNOWN_IMPLEMENTATIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
MOST_LAYERS = 1_000
INDEX_BYTES = 100_000_000
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
GENERATION_CONFIG = "generation_config.json"
OTHER_CONFIGS = (GENERATION_CONFIG, "tokenizer_config.json")
SMALL_HUB_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
HUB_FILES = [*SMALL_HUB_FILES, "*.safetensors"]
BESIDE_A_BASE = ["adapter_*"]
"""Files of adapters, which some repositories contain in addition to the model; not downloaded."""


class QuantizedFolderError(LoratuneError):
    """The weights of a model folder are already quantised."""


def find_base(settings: ModelSettings) -> Path:
    """Return the folder of the base model. A hub id is downloaded once; a local folder causes no network access.

    Raises:
        LoratuneError: there is no such folder, or the download failed.
    """
    folder = local_folder(settings) or _download(settings, HUB_FILES)
    if settings.base != TINY_QWEN:
        check_base(folder)
    return folder


def find_tokenizer(settings: ModelSettings) -> Path:
    """Return a folder with the base's tokenizer and config; nothing else of a hub id is downloaded.

    Raises:
        LoratuneError: there is no such folder, or the download failed.
    """
    folder = local_folder(settings) or _download(settings, SMALL_HUB_FILES)
    if settings.base != TINY_QWEN:
        check_config(folder)
    return folder


def find_config(settings: ModelSettings) -> tuple[Path, bool]:
    """Return a folder with the base's config, and whether it has a tokenizer; no weights are downloaded."""
    folder = local_folder(settings) or _download(settings, SMALL_HUB_FILES)
    if settings.base != TINY_QWEN:
        check_config(folder, needs_tokenizer=False)
    return folder, has_tokenizer_files(folder)


def has_tokenizer_files(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer."""
    return (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()


def local_folder(settings: ModelSettings) -> Path | None:
    """Return the folder of the practice model or of a local path; None for a hub id.

    Raises:
        LoratuneError: it is neither.
    """
    if settings.base == TINY_QWEN:
        return Path(__file__).resolve().parent.parent / "assets" / TINY_QWEN
    folder = Path(settings.base).expanduser()
    if is_folder(folder):
        return folder
    parts = settings.base.split("/")
    if len(parts) != 2 or not all(parts) or folder.is_absolute() or parts[0] in (".", "..", "~"):
        raise LoratuneError(
            f"model.base {shortened(settings.base, LONGEST_PATH)!r}: no such folder, and not a hub id (org/name)",
            Exit.MODEL,
        )
    return None


def check_base(folder: Path) -> None:
    """Raise if a folder is incomplete, of an unsupported architecture, or asks for code.

    Raises:
        LoratuneError: lists what is missing or not allowed.
    """
    check_config(folder)
    for shard in weight_files(folder):
        check_safetensors(shard)


def _adapter_in(folder: Path) -> str:
    """Return what to do with a folder that was given as a model and holds an adapter; empty without one."""
    if not any((place / ADAPTER_CONFIG).exists() for place in (folder, folder / "adapter")):
        return ""
    return "; it holds an adapter, which infer, serve and export take with --adapter, and merge makes a model of"


def check_config(folder: Path, needs_tokenizer: bool = True) -> None:
    """Raise if a folder's config or tokenizer is missing or not allowed; weights are not checked.

    Raises:
        LoratuneError: lists what is missing or not allowed.
    """
    if not (folder / CONFIG).exists():
        raise LoratuneError(
            f"{folder}: no config.json in it, so it is not a model folder{_adapter_in(folder)}", Exit.MODEL
        )
    require_plain_files(folder)
    if (folder / ADAPTER_CONFIG).exists():
        raise LoratuneError(
            f"{folder}: an adapter is next to the weights ({ADAPTER_CONFIG}), and the model would not be the base "
            "itself. Move the adapter's files to a separate folder, which infer, serve and export take with --adapter",
            Exit.MODEL,
        )
    config = read_json_object(folder / CONFIG, CONFIG_BYTES)
    for path in [folder / CONFIG, *(folder / name for name in OTHER_CONFIGS if (folder / name).exists())]:
        check_values(path, config if path.name == CONFIG else read_json_object(path, CONFIG_BYTES))
    if not is_native(config.get("model_type")):
        raise LoratuneError(
            f"{folder}: transformers has no model of its own that writes text for model_type "
            f"{config.get('model_type')!r}; loratune is tested with {', '.join(sorted(FAMILIES))}",
            Exit.MODEL,
        )
    if config.get("quantization_config") is not None:
        raise QuantizedFolderError(
            f"{folder}: its weights are quantised already; give the full-precision model (model.base in a recipe, "
            "--base-model beside an adapter, else --model). Training can quantise it: model.quantization nf4 or int8",
            Exit.MODEL,
        )
    if needs_tokenizer and not has_tokenizer_files(folder):
        raise LoratuneError(f"{folder}: no tokenizer.json in it", Exit.MODEL)


def untried(folder: Path) -> tuple[str, ...]:
    """Return a warning about a model of an architecture that loratune's tests do not have."""
    model_type = read_json_object(folder / CONFIG, CONFIG_BYTES).get("model_type")
    if model_type in FAMILIES:
        return ()
    return (
        f"{folder}: loratune has no test with model_type {model_type!r}; before training it checks on the model itself "
        "what it relies on",
    )


def check_values(path: Path, values: dict[str, Any]) -> None:
    """Raise if a config asks for code, at any depth, or has impossible numbers.

    A model's own classes (`auto_map`) may be named beside a model_type that transformers has itself: its classes are
    used, never those of the folder.

    Raises:
        LoratuneError: lists the keys.
    """
    if path.name == CONFIG and CLASSES in values and is_native(values.get("model_type")):
        values = {key: value for key, value in values.items() if key != CLASSES}
    entries = list(_entries(values))
    forbidden = [key for key, value in entries if value and (key in FORBIDDEN_KEYS or key.endswith("_internal"))]
    forbidden += [key for key, value in entries if key == "use_kernels" and value]
    forbidden += [
        key
        for key, value in entries
        if key.removeprefix("_") in IMPLEMENTATIONS and (isinstance(value, dict) or value not in KNOWN_IMPLEMENTATIONS)
    ]
    if forbidden:
        raise LoratuneError(
            f"{path} asks for code outside transformers ({', '.join(dict.fromkeys(forbidden))}); it is never run. "
            "Remove these keys if the model works without them",
            Exit.MODEL,
        )
    problems = [f"{key} is {value}" for key, value in entries if isinstance(value, float) and not math.isfinite(value)]
    layers = text_values(values).get("num_hidden_layers")
    if isinstance(layers, int) and layers > MOST_LAYERS:
        problems.append(f"num_hidden_layers is {layers:,}, more than any model has")
    if problems:
        raise LoratuneError(
            f"{path}: not the config of a model that works:\n{bullet_list(problems)}\nfetch it again, or correct it",
            Exit.MODEL,
        )


def _entries(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield all keys and values at any depth; items of a list have the list's key."""
    waiting: list[tuple[str, Any]] = [("", values)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += ((name, item) for item in value)
        if name:
            yield name, value


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, in order.

    Raises:
        LoratuneError: there are none, or a file of the index is missing or outside the folder.
    """
    path = folder / "model.safetensors.index.json"
    index = read_json_object(path, INDEX_BYTES) if path.exists() else None
    places = index.get("weight_map", {}) if index else {"": "model.safetensors"}
    if not isinstance(places, dict):
        raise LoratuneError(f"{folder}: the index has no weight_map of tensors and files", Exit.MODEL)
    strange = [name for name in places.values() if not isinstance(name, str) or Path(name).name != name]
    if strange:
        raise LoratuneError(f"{folder}: the index names files outside the folder: {strange[0]!r}", Exit.MODEL)
    names = sorted(set(places.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and not index and any(folder.glob("*.bin")):
        raise LoratuneError(
            f"{folder}: only pickled weights (.bin), which are never opened; convert them to safetensors first",
            Exit.MODEL,
        )
    if missing or not names:
        raise LoratuneError(f"{folder}: weights are missing: {', '.join(missing) or 'the index is empty'}", Exit.MODEL)
    return [folder / name for name in names]


def _download(settings: ModelSettings, patterns: list[str]) -> Path:
    """Download files of a hub id: config, tokenizer and optionally safetensors; never pickles or code."""
    place = f"model.base {settings.base!r}: no such folder"
    if settings.hub == "modelscope":
        with required(f"{place}; fetching it from ModelScope", "modelscope", Exit.MODEL):
            from modelscope import snapshot_download
    else:
        from huggingface_hub import snapshot_download
    try:
        with _download_lock(settings):
            return Path(
                snapshot_download(
                    settings.base, revision=settings.revision, allow_patterns=patterns, ignore_patterns=BESIDE_A_BASE
                )
            )
    except Exception as error:  # each hub client and HTTP library has its own exceptions
        other = "" if settings.hub == "modelscope" else " (or model.hub: modelscope, or HF_ENDPOINT with a mirror)"
        raise LoratuneError(
            f"{place}, and loading it from {settings.hub} failed: {hub_reason_of(error)}\n"
            f"check the name and the network{other}, or download the model elsewhere and give its folder in "
            "place of the hub id: as model.base of a recipe, or as the base model of an adapter",
            Exit.MODEL,
        ) from error


@contextmanager
def _download_lock(settings: ModelSettings) -> Iterator[None]:
    """Let one process of a machine download a model at a time, since ModelScope's client does not; others then find it.

    Without a writable cache folder there is no lock.
    """
    name = hashlib.sha256(f"{settings.hub} {settings.base}".encode()).hexdigest()[:32]
    with ExitStack() as stack:
        try:
            folder = cache_folder("downloads")
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / f"{name}.lock"))
        except (OSError, LoratuneError):
            pass
        yield


def check_safetensors(path: Path) -> None:
    """Compare the file's size with its header before allocating memory.

    Raises:
        LoratuneError: they do not match.
    """
    read_header(path)
    try:
        with safe_open(path, framework="numpy"):  # validates dtype, shape and offset of every tensor
            pass
    except (SafetensorError, OSError) as error:
        raise LoratuneError(f"{path}: its header contradicts itself: {error}", Exit.MODEL) from error
