"""The files of a base: complete, as long as their headers say, and with the hub's hashes where they are known."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from loratune.doctor.facts import BaseFacts
from loratune.errors import LoratuneError, refusal
from loratune.model.files import (
    CONFIG,
    HUB_FILES,
    INDEX_BYTES,
    check_config,
    check_safetensors,
    has_tokenizer_files,
    local_folder,
    weight_files,
)
from loratune.plain_files import read_json_object
from loratune.recipe.sections import ModelSettings
from loratune.runs.folder import file_sha256
from loratune.safetensors_header import read_header

COMPARED_SECONDS = 240
"""After this time no further file is hashed."""
SHA256 = re.compile("[0-9a-f]{64}")
UNFINISHED = ("*.incomplete", "*.part", "*.aria2", ".cache/huggingface/download/**/*.incomplete", "._____temp/*")
"""What the hubs' clients and common download programs leave where they were stopped."""
POINTER = b"version https://git-lfs.github.com/spec/"
SHOWN_TENSORS = 3


def base_facts(settings: dict[str, Any], hashes: Mapping[str, str] | None = None) -> BaseFacts:
    """Examine the base of a recipe where it lies on this machine; nothing is downloaded.

    Args:
        settings: the recipe's `model`.
        hashes: file → sha256 that the hub has told; others are those that its client has left.
    """
    model = ModelSettings.model_validate(settings)
    folder = folder_of(model)
    left = [*_unfinished_in_cache(model)]
    if folder is None:
        return BaseFacts(None, (), tuple(left), (), 0, 0)
    left += [str(path.relative_to(folder)) for pattern in UNFINISHED for path in sorted(folder.glob(pattern))]
    problems = [error.message for error in [refusal(lambda: check_config(folder))] if error]
    try:
        files = weight_files(folder)
    except LoratuneError as error:
        return BaseFacts(str(folder), (*problems, error.message), tuple(left), (), 0, 0, lacks_files=True)
    pointers = [path for path in files if _begins_with(path, POINTER)]
    checked = {path: refusal(partial(check_safetensors, path)) for path in files}
    damaged = {path: error for path, error in checked.items() if error}
    problems += [error.message for path, error in damaged.items() if path not in pointers]
    whole = [path for path in files if path not in damaged]
    if not damaged:
        problems += _other_than_index(folder, whole)
    compared, different = _compare_with_hub(folder, whole, hashes or {})
    return BaseFacts(
        str(folder),
        (*problems, *different),
        tuple(left),
        tuple(path.name for path in pointers),
        sum(path.stat().st_size for path in files),
        compared,
        lacks_files=not ((folder / CONFIG).exists() and has_tokenizer_files(folder)),
    )


def folder_of(settings: ModelSettings) -> Path | None:
    """Return the base's folder; that of a hub id is where the hub's client keeps it, None if it does not."""
    folder = local_folder(settings)
    if folder is not None:
        return folder
    if settings.hub == "modelscope":
        from modelscope import snapshot_download
    else:
        from huggingface_hub import snapshot_download
    try:
        kept = {"revision": settings.revision, "allow_patterns": HUB_FILES, "local_files_only": True}
        return Path(snapshot_download(settings.base, **kept))
    except Exception:  # each client has its own for what is not there
        return None


def _unfinished_in_cache(settings: ModelSettings) -> Iterator[str]:
    """Yield names of the files that Hugging Face's client began to download."""
    if local_folder(settings) is not None or settings.hub != "huggingface":
        return
    from huggingface_hub.constants import HF_HUB_CACHE

    blobs = Path(HF_HUB_CACHE, f"models--{settings.base.replace('/', '--')}", "blobs")
    yield from (path.name for path in sorted(blobs.glob("*.incomplete")))


def _other_than_index(folder: Path, files: list[Path]) -> Iterator[str]:
    """Compare which file has which tensor with the index."""
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        return
    listed = {(name, file) for name, file in read_json_object(path, INDEX_BYTES)["weight_map"].items()}
    held = {(name, file.name) for file in files for name in read_header(file)[1]}
    for found, text in (
        (listed - held, "the index names tensors that no file has"),
        (held - listed, "not in the index"),
    ):
        if found:
            shown = ", ".join(f"{name} ({file})" for name, file in sorted(found)[:SHOWN_TENSORS])
            yield f"{path}: {text}: {shown}{', …' if len(found) > SHOWN_TENSORS else ''}"


def _compare_with_hub(folder: Path, files: list[Path], hashes: Mapping[str, str]) -> tuple[int, list[str]]:
    """Return how many files were hashed, and which of them differ from what the hub has.

    Hugging Face's client names a file of its cache by its sha256, and writes it into a file beside those of a folder.
    ModelScope's leaves none.
    """
    compared, different, end = 0, list[str](), time.monotonic() + COMPARED_SECONDS
    for path in files:
        expected = hashes.get(path.name) or _hash_from_hub(folder, path)
        if expected and time.monotonic() < end:
            compared += 1
            if file_sha256(path) != expected:
                different.append(f"{path}: its bytes are not those of the hub (sha256 {expected[:12]}…)")
    return compared, different


def _hash_from_hub(folder: Path, path: Path) -> str | None:
    note = folder / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    named = path.resolve().name if path.is_symlink() else ""
    try:
        named = named or note.read_text().split()[1]
    except (OSError, IndexError, UnicodeDecodeError):
        return None
    return named if SHA256.fullmatch(named) else None


def _begins_with(path: Path, text: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(text)) == text
    except OSError:
        return False
