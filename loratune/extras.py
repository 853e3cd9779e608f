"""Packages that not everyone needs: what to install where one is missing, in one wording."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from loratune.errors import Exit, LoratuneError


def needs(wanted: str, package: str, extra: str = "", reason: str = "") -> str:
    """The sentence for a missing package.

    Args:
        wanted: what cannot be done without it.
        package: its name.
        extra: loratune's own that brings it; without one the package is installed by its name.
        reason: why it cannot be loaded, if it is there.
    """
    broken = f", which cannot be loaded ({reason})" if reason else ""
    target = f'"loratune[{extra}]"' if extra else package
    return f"{wanted} needs the package {package}{broken}: pip install {target}"


@contextmanager
def required(wanted: str, extra: str = "", exit_code: Exit = Exit.USAGE, package: str = "") -> Iterator[None]:
    """Have imports fail with what to install.

    Args:
        wanted: what cannot be done without them.
        extra: as of `needs`.
        exit_code: of the failure.
        package: the one to name, whichever of those that it imports itself is missing; else the missing one.

    Raises:
        LoratuneError: an import inside has failed.
    """
    try:
        yield
    except ImportError as error:
        missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        named = package or missing or extra
        raise LoratuneError(needs(wanted, named, extra, "" if missing == named else str(error)), exit_code) from error
