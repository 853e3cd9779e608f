"""What a run has measured on its model before the first step, for its report and its manifest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelCheck:
    """A property of the model that the run relies on."""

    name: str
    result: str
    """What was measured, and what follows from it."""
    seconds: float


def summary(checks: Iterable[ModelCheck]) -> str:
    """Return all results in one line, with the time that they took."""
    done = list(checks)
    return f"{'; '.join(check.result for check in done)} ({sum(check.seconds for check in done):.1f} s)"
