"""Collects a run's warnings for its report."""

from __future__ import annotations

from loratune import console


class Notes:
    """Prints warnings and keeps them."""

    def __init__(self) -> None:
        self._told: list[str] = []

    def warn(self, sentence: str) -> None:
        """Print a warning and add it to the report."""
        console.warn(sentence)
        self._told.append(sentence)

    @property
    def told(self) -> list[str]:
        """The warnings so far."""
        return list(self._told)
