"""Fingerprint of a base model: enough to tell another model of the same shape, in well under a second."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SAMPLE_BYTES = 4096
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


def fingerprint_base(folder: Path, weight_files: Sequence[Path]) -> dict[str, Any]:
    """Hashes of config, tokenizer and weights; of the weights, 4096 bytes from the middle of every tensor are read.

    Args:
        folder: the model folder.
        weight_files: its safetensors files.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Written by whoever saved the folder, without a bearing on what it computes.
    for key in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        config.pop(key, None)
    return {
        "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "tokenizer_sha256": _hash_files([folder / name for name in VOCABULARY_FILES]),
        "weights_sha256": _hash_tensors(weight_files),
    }


def _hash_files(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _hash_tensors(paths: Sequence[Path]) -> str:
    """Hash name, type, shape and the middle bytes of every tensor, however they are spread over files."""
    samples: dict[str, bytes] = {}
    for path in paths:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                start, end = entry["data_offsets"]
                size = min(end - start, SAMPLE_BYTES)
                file.seek(8 + length + (start + end - size) // 2)
                about = json.dumps([name, entry["dtype"], entry["shape"]]).encode()
                samples[name] = about + file.read(size)
    digest = hashlib.sha256()
    for name in sorted(samples):
        digest.update(samples[name])
    return digest.hexdigest()
