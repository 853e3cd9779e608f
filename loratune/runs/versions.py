"""Records versions of the libraries that affect results."""

from __future__ import annotations

import functools
import platform
from importlib.metadata import PackageNotFoundError, version

from loratune import __version__

LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "safetensors")


def library_versions() -> dict[str, str]:
    """Return the versions of libraries that affect a run's result."""
    versions = {"loratune": __version__, "python": platform.python_version()}
    return versions | {name: known for name in LIBRARIES if (known := version_of(name))}


@functools.cache
def version_of(package: str) -> str | None:
    """The version of an installed package; None where there is none. Asking reads the package's whole description."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
