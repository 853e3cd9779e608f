"""Where loratune keeps what it would otherwise compute again: encoded rows, hashes of models."""

from __future__ import annotations

import os
from pathlib import Path

from loratune.errors import Exit, LoratuneError


def cache_folder(kind: str) -> Path:
    """A folder of `LORATUNE_CACHE`, or of loratune's own below the user's cache; it need not exist.

    Raises:
        LoratuneError: neither is named, and the user has no home.
    """
    own = os.environ.get("LORATUNE_CACHE")
    if own:
        return Path(own) / kind
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loratune" / kind
    except RuntimeError as error:  # a user without a home, as in many containers
        raise LoratuneError("there is no home folder for a cache; set LORATUNE_CACHE to a folder", Exit.IO) from error
