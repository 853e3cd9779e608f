"""Counts what a computation asks of a device: kernels, and copies to it, which do not depend on the machine.

The device "meta" stands for a GPU: its tensors have shapes and no values, and copies to it are seen as such.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loratune.model.kernels import plain_layers

GPU = "meta"
AUTOCAST = torch.autocast
NO_KERNEL = {
    "_unsafe_view", "_reshape_alias", "_local_scalar_dense", "empty", "empty_like", "empty_strided", "new_empty",
    "new_empty_strided", "lift_fresh", "is_same_size", "device",
}  # fmt: skip
"""Operators that neither compute nor copy, beside those whose schema says that they return a view."""


class OperatorCount(TorchDispatchMode):
    """Counts the operators below autograd and autocast that would start a kernel or a copy on a GPU.

    Views, allocations without values and questions about a tensor do not count. An operator may start several kernels,
    such as a product that splits its sum; so a count is a lower bound, and comparable with others.
    """

    def __init__(self, watched: str = "") -> None:
        """Also keep the arguments of one operator, since keeping those of all would make autograd copy gradients."""
        super().__init__()
        self.watched = watched
        self.arguments: list[tuple[Any, ...]] = []
        self.names: Counter[str] = Counter()
        """Operator → number of calls."""
        self.copies = 0
        """Copies between main memory and a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # which leaves operators whole that are made of others
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        # A number in a tensor without dimensions is passed as it is.
        self.copies += {tensor.device.type for tensor in tensors if tensor.ndim} == {"cpu", GPU}
        name = func._schema.name.partition("::")[2]
        if func.is_view or name in NO_KERNEL:
            return result
        self.names[name] += 1
        if name == self.watched:
            self.arguments.append((*args, *kwargs.values()))
        return result

    def __len__(self) -> int:
        return self.names.total()


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Have tensors that are made here say that they are on a GPU. They have shapes and dtypes, but no values.

    Their device is torch's meta, because a build of torch for CPUs refuses gradients of tensors on others.
    """
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.device(GPU),
        patch.object(FakeTensor, "is_cuda", True, create=True),
        patch.object(torch, "is_autocast_enabled", return_value=False),  # which knows only devices that exist
        patch.object(torch, "autocast", _autocast),
        patch.object(plain_layers, "_is_frozen", return_value=True),  # weights here are of another class
    ):
        yield


def _autocast(device_type: str, *settings: Any, **others: Any) -> Any:
    return nullcontext() if device_type == GPU else AUTOCAST(device_type, *settings, **others)


def on_fake_gpu(batch: dict[str, Any]) -> dict[str, Any]:
    """Move the tensors of a batch."""
    return {name: value.to(GPU) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def count(work: Callable[[], Any], watched: str = "") -> OperatorCount:
    """Count the operators of a call."""
    with OperatorCount(watched) as counted:
        work()
    return counted


def varlen_by_mask(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What torch's varlen_attn computes, which runs on a GPU alone, by a dense mask: [tokens, heads, size]."""
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k == int(cu_seq_q.diff().max())
    assert cu_seq_q[-1] == len(query)
    places = torch.arange(len(query))
    documents = torch.bucketize(places, cu_seq_q[1:], right=True)
    distance = places[:, None] - places
    previous, following = window_size
    mask = documents[:, None] == documents
    mask &= (distance <= previous) | (previous < 0)
    mask &= (distance >= -following) | (following < 0)
    rows = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    output = functional.scaled_dot_product_attention(*rows, mask, scale=scale, enable_gqa=enable_gqa)
    return output[0].transpose(0, 1)


@torch.library.custom_op("loratune_tests::rms_norm", mutates_args=())
def norm_by_one_kernel(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Stands for torch's rms_norm, which is one kernel in each direction on a GPU, and many operators elsewhere."""
    return torch.empty_like(x)


@torch.library.custom_op("loratune_tests::rms_norm_backward", mutates_args=())
def _norm_backward(grad: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(grad)


norm_by_one_kernel.register_fake(lambda x, weight, epsilon: torch.empty_like(x))
_norm_backward.register_fake(torch.empty_like)
norm_by_one_kernel.register_autograd(lambda ctx, grad: (_norm_backward(grad), None, None))
