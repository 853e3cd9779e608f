"""The hashes by which evaluations, merges and exports name the adapter that they are of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath

from loratune.errors import LoratuneError
from loratune.plain_files import is_file
from loratune.runs.folder import ADAPTER, VERIFICATION
from loratune.runs.manifest import Manifest, read_manifest
from loratune.runs.verification import ExportedFolder, MergedModel, read_verification

ADAPTER_WEIGHTS = f"{ADAPTER}/adapter_model.safetensors"
DIGESTED = (".safetensors", ".json", ".jinja")
"""Suffixes of the files that say what an adapter answers."""


def adapter_digest(hashes: Mapping[str, str]) -> str:
    """Return one hash of an adapter's folder, as evaluations record it.

    Args:
        hashes: name of each file below the folder → its sha256.
    """
    names = sorted(name for name in hashes if PurePosixPath(name).suffix in DIGESTED)
    return hashlib.sha256(json.dumps([(name, hashes[name]) for name in names]).encode()).hexdigest()


def sealed_digest(manifest: Manifest) -> str | None:
    """Return the same of the adapter that a run has left; None before its end."""
    prefix, files = f"{ADAPTER}/", manifest.files or {}
    hashes = {name.removeprefix(prefix): str(files[name].get("sha256")) for name in files if name.startswith(prefix)}
    return adapter_digest(hashes) if hashes else None


def sealed_weights(manifest: Manifest) -> str | None:
    """Return the sha256 of the weights that a run has left; None before its end."""
    sha256 = (manifest.files or {}).get(ADAPTER_WEIGHTS, {}).get("sha256")
    return None if sha256 is None else str(sha256)


def merged_weights(proved: MergedModel | ExportedFolder) -> tuple[str, ...]:
    """Return the sha256 of the weights of each adapter that a model or an export was made of."""
    if proved.combined:
        return tuple(one.sha256 for one in proved.combined.adapters.values())
    return () if proved.adapter_sha256 is None else (proved.adapter_sha256,)


def merged_beside(run: Path) -> Path | None:
    """Return the merged model of a run's present adapter alone in a folder beside it; None without one.

    What cannot be read is no such model.
    """
    with suppress(LoratuneError, OSError):
        weights = sealed_weights(read_manifest(run))
        for folder in sorted(run.absolute().parent.iterdir()) if weights else ():
            if _is_merged_of(folder, str(weights)):
                return run.parent / folder.name if run.name not in ("", "..") else folder
    return None


def _is_merged_of(folder: Path, weights: str) -> bool:
    if not is_file(folder / VERIFICATION):
        return False
    with suppress(LoratuneError, OSError):
        verification = read_verification(folder)
        proved = verification.proved if verification else None
        return isinstance(proved, MergedModel) and merged_weights(proved) == (weights,)
    return False
