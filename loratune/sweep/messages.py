"""What a sweep and the processes of its trials tell each other: orders, ends, and what was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.recipe.sections import Recipe

if TYPE_CHECKING:
    from loratune.sweep.forgetting import Forgetting


@dataclass(frozen=True)
class Order:
    """What a process is to do."""

    recipes: tuple[Recipe, ...]
    """One to train, or all that are to be rehearsed."""
    share: Fraction | None
    """Of the steps to train; None to rehearse."""
    log: Path
    """Where its output goes, behind what is there."""
    environment: Mapping[str, str]
    folder: Path
    """Its working folder."""


@dataclass(frozen=True)
class Ended:
    """What a process says at its end."""

    code: int
    message: str = ""
    result: Any = None


@dataclass(frozen=True)
class Trained:
    """What a process knows of its training beside what the run folder says."""

    peak_memory_bytes: int | None
    """None where the run was complete before."""
    forgetting: Forgetting | None = None
    """Of a complete run; None if it could not be measured."""


@dataclass(frozen=True)
class Rehearsal:
    """What is known of a sweep's trials before the first one."""

    steps: tuple[int, ...]
    """Of each recipe."""
    rows: str
    """Hash of all rows."""
    date: str | None
    """The day that a template writes into prompts, which all trials have to share."""
    gpus: int
    """How many GPUs torch sees."""
    bits_per_byte: Mapping[str, float] = field(default_factory=dict)
    """Base → what a validation loss in nats per token is multiplied with; empty where all trials have one base."""
