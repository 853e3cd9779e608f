"""Counts what a decoding step asks of a device: kernels, and copies to it.

The device "meta" stands for a GPU: its tensors have shapes and no values, and copies to it are seen as such.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view", "lift_fresh", "_local_scalar_dense")


class Operators(TorchDispatchMode):  # type: ignore[misc]
    """Counts operators while it is entered. Views and allocations are none, as they launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: Counter[str] = Counter()
        """Operators that launch a kernel or copy memory."""
        self.copies = 0
        """Copies from the CPU to another device, or back."""

    def __torch_dispatch__(self, operator: Any, types: Any, arguments: Any = (), settings: Any = None) -> Any:
        settings = settings or {}
        with self:  # inference mode leaves operators whole that are made of others
            result = operator.decompose(*arguments, **settings)
        if result is not NotImplemented:
            return result
        result = operator(*arguments, **settings)
        name = operator._schema.name.removeprefix("aten::")
        tensors = [leaf for leaf in tree_leaves((arguments, settings, result)) if torch.is_tensor(leaf)]
        # A number in a tensor without dimensions is passed as it is.
        self.copies += {one.device.type for one in tensors if one.ndim} == {"cpu", "meta"}
        is_view = any(one.alias_info and not one.alias_info.is_write for one in operator._schema.returns)
        if not is_view and name not in _NO_KERNEL:
            self.launched[name] += 1
        return result
