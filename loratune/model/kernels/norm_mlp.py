"""RMS norms and gated MLPs with fewer passes over memory, and with less kept for the backward pass.

What is computed is what transformers' modules compute; each module is taken over only if it is seen to do just that.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from loratune import console

CHECKED_ROWS = 4
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Largest relative difference that rounding explains."""


class _Kernels(NamedTuple):
    """The two functions that modules are made of."""

    norm: Callable[[Any, Any, float], Any]
    """x (…, width), weight (width), ε → x / √(mean x² + ε) · weight, in float32 inside."""
    gate: Callable[[Any, Any], Any]
    """gate, up → silu(gate) · up."""


def use_fused_elementwise(model: Any) -> int:
    """Replace the forward of the frozen RMS norms and SiLU-gated MLPs of a model.

    Args:
        model: a causal language model, with or without an adapter on it.

    Returns:
        How many modules are taken over.
    """
    liger = _liger_kernels(model) if model.device.type == "cuda" else None
    choices = [liger, _OWN] if liger else [_OWN]
    chosen: dict[Any, _Kernels | None] = {}  # for each class of module and of activation, as its first one shows
    taken = 0
    for module in model.modules():
        make = _norm_with if _looks_like_norm(module) else _gated_mlp_with if _looks_like_gated_mlp(module) else None
        if make is None or "forward" in vars(module):
            continue
        kind = (type(module), type(getattr(module, "act_fn", None)))
        if kind not in chosen:
            fitting = (kernels for kernels in choices if _gives_the_same(module, MethodType(make(kernels), module)))
            chosen[kind] = next(fitting, None)
        kernels = chosen[kind]
        if kernels is not None:
            module.forward = MethodType(make(kernels), module)
            taken += 1
    return taken


def _liger_kernels(model: Any) -> _Kernels | None:
    """Liger's, which do everything in one pass over a GPU's memory, where they are installed and run."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    no_offset, casting, in_place = 0.0, "llama", False
    try:
        norms = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
        gates = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
        kernels = _Kernels(lambda *inputs: norms.apply(*inputs, no_offset, casting, in_place), gates.apply)
        rows = torch.ones(2, 64, device=model.device, requires_grad=True)
        kernels.gate(kernels.norm(rows, rows[0].detach(), 1e-6), rows).sum().backward()
    except Exception as error:  # a compiler that is not ours may raise anything, and training goes without it
        console.warn(f"liger-kernel is installed but does not run here, so it is not used: {error}")
        return None
    return kernels


def _looks_like_norm(module: Any) -> bool:
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
        return False
    return type(module.weight) is nn.Parameter and not module.weight.requires_grad


def _looks_like_gated_mlp(module: Any) -> bool:
    parts = dict(module.named_children())
    return parts.keys() == {"gate_proj", "up_proj", "down_proj", "act_fn"}


def _norm_with(kernels: _Kernels) -> Callable[[Any, Any], Any]:
    return lambda module, x: kernels.norm(x, module.weight, module.variance_epsilon)


def _gated_mlp_with(kernels: _Kernels) -> Callable[[Any, Any], Any]:
    return lambda module, x: module.down_proj(kernels.gate(module.gate_proj(x), module.up_proj(x)))


def _gives_the_same(module: Any, forward: Callable[[Any], Any]) -> bool:
    """Whether a forward computes what the module's own does, and its gradient, on some random rows."""
    weight = module.weight if _looks_like_norm(module) else module.gate_proj.weight
    width = len(weight) if weight.ndim == 1 else module.gate_proj.in_features
    dtype = weight.dtype if weight.is_floating_point() else torch.bfloat16
    random = torch.Generator().manual_seed(0)
    x, direction = torch.randn(2, 1, CHECKED_ROWS, width, generator=random).to(weight.device, dtype)
    was_training = module.training
    module.eval()
    results = []
    for function in (module, forward):
        rows = x.clone().requires_grad_()
        with torch.enable_grad():
            output = function(rows)
        results.append((output.float(), torch.autograd.grad(output, rows, direction.expand_as(output))[0].float()))
    module.train(was_training)
    return all((own - other).norm() <= TOLERANCES[dtype] * own.norm() for own, other in zip(*results, strict=True))


class _RMSNorm(torch.autograd.Function):
    """Keeps its input, which is the residual stream and there anyway, in place of a float32 copy."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, epsilon: float) -> Any:
        normed = x.to(torch.float32, copy=True)  # products of two types would take twice as long
        scale = torch.linalg.vecdot(normed, normed).div_(x.shape[-1]).add_(epsilon).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, scale)
        return normed.mul_(scale).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Any) -> tuple[Any, ...]:
        x, weight, scale = ctx.saved_tensors
        of_normed, rows = (grad * weight).float(), x.float()
        # d(x·s)/dx = s − x·xᵀ·s³/width
        along = torch.linalg.vecdot(of_normed, rows).unsqueeze(-1).div_(x.shape[-1]).mul_(scale.pow(3))
        return of_normed.mul_(scale).addcmul_(rows, along, value=-1).to(x.dtype), None, None


class _GatedSiLU(torch.autograd.Function):
    """silu(gate) · up; silu(gate) is computed again instead of kept."""

    @staticmethod
    def forward(ctx: Any, gate: Any, up: Any) -> Any:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Any) -> tuple[Any, Any]:
        gate, up = ctx.saved_tensors
        of_up = functional.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), of_up


_OWN = _Kernels(_RMSNorm.apply, _GatedSiLU.apply)
