"""The files of a base's tokenizer, which are copied byte for byte, because saving a tokenizer changes some."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from loratune.errors import Exit, LoratuneError
from loratune.plain_files import read_json_object, read_plain

TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
# In hashing order; manifests contain the hash.
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    CHAT_TEMPLATE,
    "chat_template.json",
)
VOCABULARY_FILES = ("tokenizer.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model")
"""Files with tokens and their ids."""
FINGERPRINTED = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
"""Files of a base's fingerprint, in hashing order; manifests contain the hash."""
NAMED_TEMPLATES = "additional_chat_templates"
"""Folder of the non-default templates."""


def tokenizer_files(folder: Path) -> Iterator[str]:
    """Yield the names of a folder's tokenizer files and chat templates."""
    yield from (name for name in TOKENIZER_FILES if (folder / name).is_file())
    yield from (
        f"{NAMED_TEMPLATES}/{path.name}"
        for path in sorted((folder / NAMED_TEMPLATES).glob("*.jinja"))
        if path.is_file()
    )


def copy_tokenizer_files(base: Path, folder: Path) -> None:
    """Copy the existing files of a base's tokenizer."""
    for name in tokenizer_files(base):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(base / name, folder / name)


def tokenizer_sha256(folder: Path) -> str:
    """Return the hash of all files of a tokenizer and its chat templates."""
    files = hashlib.sha256()
    for name in tokenizer_files(folder):
        content = read_plain(folder / name)
        files.update(f"{name} {len(content)} ".encode() + content)
    return files.hexdigest()


def count_tokens(folder: Path) -> int:
    """Return the highest id of a tokenizer plus one, without loading it; 0 if no file has ids.

    Raises:
        LoratuneError: a file is damaged.
    """
    whole = folder / "tokenizer.json"
    paths = [whole] if whole.is_file() else [folder / "vocab.json", folder / "added_tokens.json"]
    ids = [-1]
    for path in (path for path in paths if path.is_file()):
        content = read_json_object(path)
        try:
            if path == whole:
                vocabulary = content["model"]["vocab"]  # a mapping of names to ids, or a list
                ids += [len(vocabulary) - 1, *(token["id"] for token in content.get("added_tokens") or [])]
            else:
                ids += content.values()
        except (KeyError, TypeError) as error:
            raise LoratuneError(f"{path}: damaged: it does not say which tokens there are", Exit.MODEL) from error
    return max(ids) + 1
