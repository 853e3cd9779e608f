"""The argument by which a module takes the cache of earlier tokens. Its name depends on the release of transformers."""

from __future__ import annotations

import inspect
from typing import Any

NAMES = ("cache", "past_key_values", "cache_params")
"""`cache` in every model since transformers 5.24, one of the others before. Outputs have their cache under it too."""


def cache_argument(module: Any) -> str:
    """Return the name of the argument for the cache; nothing for a module that takes none.

    Args:
        module: a model, a decoder or a layer. The signature of its class counts.
    """
    taken = inspect.signature(type(module).forward).parameters
    return next((name for name in NAMES if name in taken), "")
