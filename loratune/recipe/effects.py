"""Settings that act on neither the trained weights nor the speed and memory of the training."""

from __future__ import annotations

TOLD_OR_KEPT = ("output", "tracking", "checkpoints.keep", "checkpoints.every_steps", "evaluation.questions_share")
"""Settings and sections of what is told and kept of a run."""
OF_SEVERAL_PROCESSES = ("training.ddp_timeout", "model.sharding")
"""Those that act only where several processes train one adapter, and on no result there."""


def is_among(setting: str, names: tuple[str, ...]) -> bool:
    """Return whether a dotted setting is one of some settings, or in one of some sections."""
    return any(setting == name or setting.startswith(f"{name}.") for name in names)
