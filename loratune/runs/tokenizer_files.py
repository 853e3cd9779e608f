"""The base's tokenizer, byte for byte: saving it again through a library changes files that servers depend on."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


def copy_tokenizer_files(base: Path, folder: Path) -> None:
    """Copy the files of the base's tokenizer that there are."""
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)


def tokenizer_sha256(folder: Path) -> str:
    """Hash of all files that a tokenizer and its chat template come from."""
    files = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            files.update(f"{name} {len(content)} ".encode() + content)
    return files.hexdigest()
