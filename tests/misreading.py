"""A planted fault of merges: the adapter is understood as another one, throughout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loratune.delivery.merge import job
from loratune.delivery.merge.update import TensorUpdate


def misread_updates(patch: pytest.MonkeyPatch, change: Callable[[dict[str, TensorUpdate]], Any]) -> None:
    """Have a merge read updates with a change, made in place."""
    read = job.read_updates

    def read_wrong(*arguments: Any) -> dict[str, TensorUpdate]:
        updates = read(*arguments)
        change(updates)
        return updates

    patch.setattr(job, "read_updates", read_wrong)
