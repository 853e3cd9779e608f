"""Records in an export which adapter and base it was made of, by their hashes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from loratune.model.adapter.files import WEIGHTS_FILE
from loratune.runs.base_check import known_hashes
from loratune.runs.fingerprint import FULL
from loratune.runs.folder import file_sha256
from loratune.runs.opening import AdapterSource
from loratune.runs.verification import ExportedFolder, MergedModel, read_verification


def of_model(exported: ExportedFolder, model: Path) -> ExportedFolder:
    """Add what the exported model was merged from, if loratune has merged it."""
    verification = read_verification(model)
    if verification is None or not isinstance(merged := verification.proved, MergedModel):
        return exported
    return replace(
        exported, base_sha256=merged.base_sha256, adapter_sha256=merged.adapter_sha256, combined=merged.combined
    )


def of_adapter(exported: ExportedFolder, source: AdapterSource) -> ExportedFolder:
    """Add the exported adapter, and the base of its training."""
    sha256, base = file_sha256(source.adapter / WEIGHTS_FILE), known_hashes(source).get(FULL)
    return replace(exported, base_sha256=base, adapter_sha256=sha256, combined=source.combined)
