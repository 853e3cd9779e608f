"""The bounds of what a fine-tune may forget; a module of their own, so that the command line reads them quickly."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """What forgetting may cost."""

    loss: float = 0.1
    """Nats per token by which the loss of general text may rise."""
    changed: float = 0.1
    """Share of the general instructions whose answer may change its language, become a refusal or empty."""
