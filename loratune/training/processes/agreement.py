"""Checks that all processes of a run train on the same."""

from __future__ import annotations

from typing import Any

from loratune.errors import Exit, LoratuneError, bullet_list
from loratune.training.processes.group import from_all


def require_same_everywhere(identity: dict[str, Any]) -> None:
    """Refuse to train where a process has other rows, another base or other settings: each machine reads its own files.

    Args:
        identity: see `identity_of`; each process has to call this.

    Raises:
        LoratuneError: lists what differs from the first process.
    """
    own = {**identity["settings"], **identity["rest"]}
    first, *others = from_all(own)
    problems = [
        f"{name}: {first.get(name, 'nothing')} in process 0, {other.get(name, 'nothing')} in process {number}"
        for number, other in enumerate(others, 1)
        for name in sorted({*first, *other})
        if first.get(name) != other.get(name)
    ]
    if problems:
        raise LoratuneError(
            f"the processes would not train on the same:\n{bullet_list(problems)}\n"
            "each machine needs the same recipe, data and base",
            Exit.USAGE,
        )
