"""The hashes that ModelScope has of a base, since its client leaves none beside the files."""

from __future__ import annotations

from typing import Any

from loratune.delivery.export.hub import modelscope_files
from loratune.doctor.probes.base import folder_of
from loratune.recipe.sections import ModelSettings

SNAPSHOTS = "snapshots"
"""Parent of the folders that the client names after revisions."""


def modelscope_hashes(settings: dict[str, Any]) -> dict[str, str]:
    """Return file → sha256 of the revision that is on this machine; nothing is asked if none is."""
    model = ModelSettings.model_validate(settings)
    folder = folder_of(model)
    if folder is None:
        return {}
    revision = folder.name if folder.parent.name == SNAPSHOTS else model.revision
    files = modelscope_files(model.base, revision)
    return {name: file.sha256.lower() for name, file in files.items() if file.sha256}
