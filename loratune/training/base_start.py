"""Keeps both halves of matrices that begin with a part of the base (PiSSA, OLoRA) in step."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from loratune.model.adapter.starts import differences
from loratune.protocols import AdaptedModel


class BaseStart(TrainerCallback):
    """Adds what the optimizer has changed in ΔB to B.

    Args:
        model: the model with the adapter; without effect unless it starts from the base.
        is_used: whether the adapter starts from the base.
    """

    def __init__(self, model: AdaptedModel, is_used: bool) -> None:
        self._model, self._is_used = model, is_used
        self._before: list[Any] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remember each ΔB."""
        if self._is_used:
            self._before = [difference.clone() for _, difference in differences(self._model)]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Change each B by as much as ΔB has changed."""
        if self._is_used:
            for (whole, difference), before in zip(differences(self._model), self._before, strict=True):
                whole += difference - before
