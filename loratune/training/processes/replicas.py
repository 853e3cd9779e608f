"""Keeps the trained weights of all processes equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn


class Replicas(nn.Module):
    """A model with the same trained weights in every process, in the place of `DistributedDataParallel`.

    DDP orders its buckets anew after the first step of a program. With more than two processes a resumed run would add
    gradients in another order than the run before the interruption.

    Args:
        module: the model; its trained weights become those of the first process.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self._trained = [weight for weight in module.parameters() if weight.requires_grad]
        with torch.no_grad():
            for weight in self._trained:
                distributed.broadcast(weight.data, src=0)

    def forward(self, *arguments: Any, **inputs: Any) -> Any:
        return self.module(*arguments, **inputs)

    def average_gradients(self) -> None:
        """Replace the gradients by their means over the processes; each process has to call this."""
        gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in self._trained]
        flat = torch.cat([gradient.flatten() for gradient in gradients]).div_(distributed.get_world_size())
        distributed.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        for weight, part in zip(self._trained, parts, strict=True):
            weight.grad = part.view_as(weight)
