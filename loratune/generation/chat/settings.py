"""The `/set` command: changes sampling settings."""

from __future__ import annotations

import shlex
from typing import Any

from loratune.engine.sampling import NUMBERS, Sampling
from loratune.errors import Exit, LoratuneError
from loratune.nearest import nearest

UNSET = "default"


NAMES = [*NUMBERS, "stop"]


def changed(sampling: Sampling, arguments: str) -> Sampling:
    """Return the settings with some changed.

    Args:
        sampling: the current settings.
        arguments: such as `temperature=0.2 stop="Human: "`; `stop` may be repeated, and `\\n` in it is a line break.

    Raises:
        LoratuneError: a name is unknown, or a value is invalid.
    """
    lexer = shlex.shlex(arguments, posix=True)
    lexer.whitespace_split, lexer.escape, lexer.commenters = True, "", ""
    try:
        words = list(lexer)
    except ValueError as error:
        raise LoratuneError(f"/set: {str(error).lower()}; write name=value", Exit.USAGE) from error
    changes: dict[str, Any] = {}
    for word in words:
        name, sign, value = word.partition("=")
        name = name.replace("-", "_")
        if name not in NAMES:
            near = nearest(name, NAMES)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(NAMES)}"
            raise LoratuneError(f"/set: no setting {name!r}; {hint}", Exit.USAGE)
        if not sign:
            raise LoratuneError(f"/set: write {name}=value, without spaces", Exit.USAGE)
        if name == "stop":
            text = value.replace("\\n", "\n")
            changes["stop"] = (*changes.get("stop", ()), *([text] if text else []))
        else:
            changes[name] = None if value == UNSET and NUMBERS[name].unset else NUMBERS[name].read(value)
    return sampling.but(**changes)


def rows_of(sampling: Sampling) -> list[tuple[str, str]]:
    """Return all settings by name, with their values as text."""
    rows = []
    for name, setting in NUMBERS.items():
        value = getattr(sampling, name)
        rows.append((name, f"{UNSET} ({setting.unset})" if value is None else str(value)))
    return [*rows, ("stop", ", ".join(map(repr, sampling.stop)) or "none")]
