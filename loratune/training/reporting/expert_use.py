"""Counts the tokens that routers send to each expert during training."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

from loratune.model.architecture.roles import router_modules
from loratune.protocols import AdaptedModel
from loratune.runs.report import ExpertUse


class ExpertCounter(TrainerCallback):
    """Counts tokens per expert, on the device and without waiting for it.

    Args:
        model: a PEFT model; nothing is counted if it has no routers.
    """

    def __init__(self, model: AdaptedModel) -> None:
        self._routers, self._counts = router_modules(model), dict[int, torch.Tensor]()
        self._hooks: list[Any] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Listen to the routers."""
        self._hooks = [router.register_forward_hook(self._count) for router in self._routers]

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stop listening."""
        for hook in self._hooks:
            hook.remove()

    @property
    def use(self) -> ExpertUse | None:
        """How many experts got tokens, of all layers together; None for a model without routers."""
        counts = list(self._counts.values())
        if not counts:
            return None
        used = sum(int((tokens > 0).sum()) for tokens in counts)
        return ExpertUse(used=used, all=sum(len(tokens) for tokens in counts))

    def _count(self, router: Any, _: Any, output: Any) -> None:
        parts = [part for part in output if isinstance(part, torch.Tensor)] if isinstance(output, tuple) else []
        chosen = next((part for part in parts if not part.is_floating_point()), None)
        if chosen is None:  # a router that returns no numbers of experts
            return
        numbers = chosen.detach().flatten()
        held = self._counts.setdefault(id(router), numbers.new_zeros(parts[0].shape[-1]))
        held.index_add_(0, numbers, torch.ones_like(numbers))
