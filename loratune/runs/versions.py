"""Records versions of the libraries that affect results."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from loratune import __version__

LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "safetensors")


def library_versions() -> dict[str, str]:
    """Return the versions of libraries that affect a run's result."""
    versions = {"loratune": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
