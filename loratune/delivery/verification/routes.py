"""Lets models that are compared choose alike where their scores nearly tie.

A mixture sends each token to the parts with the highest scores. Where two scores nearly tie, the rounding of float32
decides, and another choice changes logits by orders of magnitude more than rounding does. Every choice in a forward
pass is a call of `topk`, so no family has to be known.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

NEAR_TIE = 1e-3
"""Difference of two scores, relative to the largest one, below which another model's choice is taken."""
TOPK = (torch.topk, torch.Tensor.topk)

Choices = deque[torch.Tensor]


class Routes:
    """The choices of one model, for those that run on the same tokens after it."""

    def __init__(self) -> None:
        self._waiting: list[Choices] = []

    def noted(self) -> AbstractContextManager[None]:
        """Note the choices of the forward passes within."""
        return _Noted(self._waiting)

    def follower(self) -> Callable[[], AbstractContextManager[None]]:
        """Return what makes the forward passes of another model take the noted choices, each once."""
        waiting = Choices()
        self._waiting.append(waiting)
        return partial(_Followed, waiting)


class _Noted(TorchFunctionMode):
    def __init__(self, waiting: list[Choices]) -> None:
        super().__init__()
        self._waiting = waiting

    def __torch_function__(self, function: Any, _: Any, arguments: Any = (), settings: Any = None) -> Any:
        result = function(*arguments, **(settings or {}))
        if function in TOPK:
            for waiting in self._waiting:
                waiting.append(result.indices)
        return result


class _Followed(TorchFunctionMode):
    def __init__(self, waiting: Choices) -> None:
        super().__init__()
        self._waiting = waiting

    def __torch_function__(self, function: Any, _: Any, arguments: Any = (), settings: Any = None) -> Any:
        own = function(*arguments, **(settings or {}))
        if function not in TOPK:
            return own
        scores, dim = arguments[0], arguments[2] if len(arguments) > 2 else (settings or {}).get("dim", -1)
        others = self._waiting.popleft().to(scores.device)
        if others.shape != own.indices.shape or int(others.max()) >= scores.shape[dim]:
            return own
        lost = own.values.amin(dim, keepdim=True) - scores.gather(dim, others).amin(dim, keepdim=True)
        is_near = lost <= NEAR_TIE * own.values.abs().amax(dim, keepdim=True)
        indices = torch.where(is_near, others, own.indices)
        return torch.return_types.topk((scores.gather(dim, indices), indices))
