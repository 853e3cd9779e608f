"""Finds the name that a misspelt one is most like."""

import difflib
from collections.abc import Iterable

ALIKE = 0.6
"""Least ratio of `difflib.SequenceMatcher` at which one name may be meant by another; 1 for equal ones."""
MISSPELT = 0.8
"""The same where something is concluded from it: about one letter of five may differ."""


def nearest(name: str, known: Iterable[str], least: float = ALIKE) -> str:
    """Return the known name that a name is most like; empty if none is like it."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=least)), "")
