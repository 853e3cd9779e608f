"""Locates loratune's cache, which stores encoded rows and hashes of models."""

from __future__ import annotations

import os
from pathlib import Path

from loratune.errors import Exit, LoratuneError


def cache_folder(kind: str) -> Path:
    """Return a folder in `LORATUNE_CACHE`, or in loratune's folder of the user's cache; it may not exist yet.

    Raises:
        LoratuneError: no cache folder is set, and the user has no home folder.
    """
    own = os.environ.get("LORATUNE_CACHE")
    if own:
        return Path(own) / kind
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loratune" / kind
    except RuntimeError as error:  # no home folder, as in many containers
        raise LoratuneError("there is no home folder for a cache; set LORATUNE_CACHE to a folder", Exit.IO) from error
