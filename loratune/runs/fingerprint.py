"""Fingerprints a base model: config, tokenizer and all bytes of the weights, or samples of them for a quick check."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loratune.plain_files import read_json_object
from loratune.runs.folder import values_sha256
from loratune.runs.tensor_hashes import TensorHashes
from loratune.runs.tokenizer_files import FINGERPRINTED
from loratune.safetensors_header import read_header

SAMPLE_BYTES = 4096
SAMPLED, FULL, TENSORS = "weights_sha256", "tensors_sha256", "tensors"
"""Keys in a manifest; runs of early versions only have the samples."""


def fingerprint_base(folder: Path, weight_files: Sequence[Path], hashes: TensorHashes | None = None) -> dict[str, Any]:
    """Return the fingerprint of a base for a manifest.

    Args:
        folder: the model folder.
        weight_files: its safetensors files.
        hashes: hashes of their tensors, if already started.

    Returns:
        `sampled_fingerprint`, `tensors_sha256` over all bytes, and `tensors` with a hash of each.
    """
    tensors = (hashes or TensorHashes(weight_files)).result()
    return sampled_fingerprint(folder, weight_files) | {FULL: values_sha256(tensors), TENSORS: tensors}


def sampled_fingerprint(folder: Path, weight_files: Sequence[Path]) -> dict[str, str]:
    """Return hashes of config, tokenizer, and 4096 bytes from the middle of every tensor.

    Args:
        folder: the model folder.
        weight_files: its safetensors files.
    """
    config = read_json_object(folder / "config.json")
    # Set by the program that saved the folder, without effect on the computation.
    for key in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        config.pop(key, None)
    return {
        "config_sha256": values_sha256(config),
        "tokenizer_sha256": _hash_files([folder / name for name in FINGERPRINTED]),
        SAMPLED: _hash_samples(weight_files),
    }


def _hash_files(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _hash_samples(paths: Sequence[Path]) -> str:
    """Hash name, dtype, shape and middle bytes of every tensor, independent of the distribution over files."""
    samples: dict[str, bytes] = {}
    for path in paths:
        begin, header = read_header(path)
        with path.open("rb") as file:
            for name, entry in header.items():
                start, end = entry["data_offsets"]
                size = min(end - start, SAMPLE_BYTES)
                file.seek(begin + (start + end - size) // 2)
                about = json.dumps([name, entry["dtype"], entry["shape"]]).encode()
                samples[name] = about + file.read(size)
    digest = hashlib.sha256()
    for name in sorted(samples):
        digest.update(samples[name])
    return digest.hexdigest()
