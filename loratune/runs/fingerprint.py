"""Fingerprint of a base model: enough to tell another model of the same shape, in well under a second."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SAMPLES_PER_FILE = 16
SAMPLE_BYTES = 64 * 1024
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


def fingerprint_base(folder: Path, weight_files: Sequence[Path]) -> dict[str, Any]:
    """Hashes of config, tokenizer and weights; of the weights, evenly spaced samples of every file are read.

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
        "tokenizer_sha256": _hash_files([folder / name for name in TOKENIZER_FILES]),
        "weights_sha256": _hash_samples(weight_files),
        "weights_bytes": sum(path.stat().st_size for path in weight_files),
    }


def _hash_files(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _hash_samples(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        with path.open("rb") as file:
            for sample in range(SAMPLES_PER_FILE):
                file.seek((size - min(size, SAMPLE_BYTES)) * sample // (SAMPLES_PER_FILE - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
