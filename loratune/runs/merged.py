"""What is recorded of a merge beside what running the models has shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ReadBack:
    """What comparing a merged model's files with the base and with PEFT's own merge has shown."""

    tensors: int
    identical: int = 0
    """Tensors without an update whose every byte is the base's, or its value rounded to the new type."""
    converted: int | None = None
    """How many of those have another type than the base's; None where an earlier version did not say."""
    updated: int = 0
    rows: int = 0
    """Rows of updated tensors, all of which have been compared with PEFT's own."""
    sampled_rows: int = 0
    """Of those, the ones that were computed in float64 too."""
    largest_error_steps: float = 0.0
    """Largest difference from base + update, in rounding steps of the written type; rounding alone makes up to 0.5."""
    largest_forward_error: float = 0.0
    """Of a layer: how far PEFT's merge lies from PEFT's own pass, as a share of how far the base alone does."""
    lost_to_rounding: float = 0.0
    """Size of what rounding has changed, as a share of the update's."""
    unchanged: tuple[str, ...] = ()
    """Updated tensors of which every value still equals the base's: the update is smaller than the type can hold."""


@dataclass(frozen=True)
class CombinedAdapter:
    """One of several that were merged together."""

    weight: float
    sha256: str


@dataclass(frozen=True)
class Combined:
    """How several adapters became one."""

    method: str
    density: float | None
    adapters: Mapping[str, CombinedAdapter]


@dataclass(frozen=True)
class MergeSeconds:
    """Since the process began."""

    until_files_proved: float
    total: float
