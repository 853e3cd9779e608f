"""Builds the manifest that a run writes before its first step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratune.model.files import weight_files
from loratune.model.hardware import Hardware
from loratune.runs.fingerprint import fingerprint_base
from loratune.runs.manifest import Manifest, TrainedBase, TrainedFile, TrainedTemplate
from loratune.runs.record import RunRecord
from loratune.runs.versions import library_versions
from loratune.runtime import is_on_one_machine
from loratune.training.checkpoints.resuming import identity_of

if TYPE_CHECKING:
    from loratune.training.session import Prepared


def manifest_of(session: Prepared) -> Manifest:
    """Return the manifest for later commands; waits until the base is hashed."""
    hashes = fingerprint_base(session.base, weight_files(session.base), session.hashes)
    return Manifest(
        base=TrainedBase(session.recipe.model.base, str(session.base.absolute()), hashes),
        template=TrainedTemplate(**session.encoder.record),
        data=tuple(TrainedFile(**{**vars(use), "ignored": tuple(use.ignored)}) for use in session.data.files),
        seed=session.recipe.seed,
        versions=library_versions(),
        record=RunRecord.of(session.recipe),
        gpus=_gpus(session.hardware),
    )


def _gpus(hardware: Hardware) -> int:
    # Whichever launcher has started the processes: the run goes on in as many.
    return hardware.processes if hardware.is_gpu and is_on_one_machine() else 1


def identity_now(session: Prepared) -> dict[str, Any]:
    """Return everything that affects the bits of the adapter, for this process."""
    return identity_of(session.recipe, manifest_of(session), session.hardware)
