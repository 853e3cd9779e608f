"""What a run has warned of, for its report."""

from __future__ import annotations

from loratune import console


class Notes:
    """Warnings as they come, each shown and kept."""

    def __init__(self) -> None:
        self._told: list[str] = []

    def warn(self, sentence: str) -> None:
        """Show it now, and have it in the report."""
        console.warn(sentence)
        self._told.append(sentence)

    @property
    def told(self) -> list[str]:
        """What there has been so far."""
        return list(self._told)
