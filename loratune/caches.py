"""Where loratune keeps what it would otherwise compute again: encoded rows, hashes of models."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """A folder of `LORATUNE_CACHE`, or of loratune's own below the user's cache; it need not exist."""
    own = os.environ.get("LORATUNE_CACHE")
    if own:
        return Path(own) / kind
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loratune" / kind
