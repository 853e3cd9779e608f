"""Optional packages: checks for them, and a uniform message about what to install."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from loratune.errors import Exit, LoratuneError

FOR_EVALUATION = ("jieba", "rouge_score", "sacrebleu")
"""Modules without which `loratune eval` compares no answers; all are of the extra `eval`."""


def needs(wanted: str, package: str, extra: str = "", reason: str = "") -> str:
    """Return the message for a missing package.

    Args:
        wanted: the feature that needs it.
        package: name of the package.
        extra: loratune's extra that installs it; if empty, the package is installed by name.
        reason: import error of an installed package.
    """
    broken = f", which cannot be loaded ({reason})" if reason else ""
    target = f'"loratune[{extra}]"' if extra else package
    return f"{wanted} needs the package {package}{broken}: {pip_install(target)}"


def pip_install(target: str) -> str:
    """Return the command line that installs `target`: packages and options, separated by blanks."""
    return f"pip install {target}"


def first_install(modules: tuple[str, ...], extra: str) -> str:
    """Return what has to be typed before a command that needs some modules; empty if all are installed.

    Args:
        modules: names of top-level modules, which are looked for and not imported.
        extra: loratune's extra that installs them.
    """
    return "" if all(map(find_spec, modules)) else pip_install(f'"loratune[{extra}]"')


@contextmanager
def required(wanted: str, extra: str = "", exit_code: Exit = Exit.USAGE, package: str = "") -> Iterator[None]:
    """Turn import errors in the `with` block into a message about what to install.

    Args:
        wanted: the feature that needs the imports.
        extra: see `needs`.
        exit_code: exit code of the error.
        package: package to name even if one of its own dependencies is missing; default is the missing one.

    Raises:
        LoratuneError: an import failed.
    """
    try:
        yield
    except ImportError as error:
        missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        named = package or missing or extra
        raise LoratuneError(needs(wanted, named, extra, "" if missing == named else str(error)), exit_code) from error
