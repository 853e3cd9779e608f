"""RMSNorm and gated MLP kernels with fewer memory passes and smaller saved activations.

The results equal those of transformers' modules; a module is replaced only after a numerical comparison.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from loratune import console
from loratune.model.architecture.roles import GatedMlp, gated_mlp, is_rms_norm
from loratune.protocols import CausalModel

Forward = Callable[[Any, Any], Any]
"""Function of a module and its input."""
CHECKED_ROWS = 4
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Largest relative difference due to rounding."""


class _Kernels(NamedTuple):
    """The two functions that modules are composed of."""

    norm: Callable[[Any, Any, float], Any]
    """x (…, width), weight (width), ε → x / √(mean x² + ε) · weight, computed in float32."""
    gate: Callable[[Any, Any], Any]
    """gate, up → silu(gate) · up."""


def use_fused_elementwise(model: CausalModel) -> int:
    """Replace the forward of the frozen RMS norms and SiLU-gated MLPs of a model.

    Args:
        model: a causal language model, with or without an adapter.

    Returns:
        The number of replaced modules.
    """
    device = next(model.parameters()).device
    choices = [_liger_kernels(device), _TORCH, _OWN] if device.type == "cuda" else [_OWN]
    chosen: dict[Any, Forward | None] = {}  # per class of module and activation: the result for its first instance
    taken = 0
    for module in model.modules():
        makers = _makers(module)
        if not makers or "forward" in vars(module):
            continue
        kind = (type(module), *(type(child) for child in module.children() if not [*child.parameters()]))
        if kind not in chosen:
            forwards = (make(kernels) for kernels in choices if kernels for make in makers)
            chosen[kind] = next((one for one in forwards if _gives_the_same(module, MethodType(one, module))), None)
        forward = chosen[kind]
        if forward is not None:
            module.forward = MethodType(forward, module)
            taken += 1
    return taken


def _liger_kernels(device: torch.device) -> _Kernels | None:
    """Liger's, which do everything in one pass over a GPU's memory, where they are installed and run."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    no_offset, casting, in_place = 0.0, "llama", False
    try:
        norms = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
        gates = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
        kernels = _Kernels(lambda *inputs: norms.apply(*inputs, no_offset, casting, in_place), gates.apply)
        rows = torch.ones(2, 64, device=device, requires_grad=True)
        kernels.gate(kernels.norm(rows, rows[0].detach(), 1e-6), rows).sum().backward()
    except Exception as error:  # Triton may raise anything; training works without it
        console.warn(f"liger-kernel is installed but does not run here, so it is not used: {error}")
        return None
    return kernels


def _makers(module: Any) -> list[Callable[[_Kernels], Forward]]:
    """Return the candidates for what a module computes, the most likely first."""
    if is_rms_norm(module):
        is_frozen = type(module.weight) is nn.Parameter and not module.weight.requires_grad
        return [_norm_with] if is_frozen else []
    return [partial(_gated_mlp_with, names) for names in gated_mlp(module)]


def _norm_with(kernels: _Kernels) -> Forward:
    return lambda module, x: kernels.norm(x, module.weight, module.variance_epsilon)


def _gated_mlp_with(names: GatedMlp, kernels: _Kernels) -> Forward:
    gate, up, down = attrgetter(names.gate), attrgetter(names.up), attrgetter(names.down)
    return lambda module, x: down(module)(kernels.gate(gate(module)(x), up(module)(x)))


def _gives_the_same(module: Any, forward: Callable[[Any], Any]) -> bool:
    """Whether a forward computes what the module's own does, and its gradient, on some random rows."""
    first = module if is_rms_norm(module) else module.get_submodule(next(gated_mlp(module)).gate)
    weight = first.weight
    width = len(weight) if first is module else first.in_features
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
    """Saves its input, the residual stream that exists anyway, instead of a float32 copy."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, epsilon: float) -> Any:
        normed = x.to(torch.float32, copy=True)  # products of two types would take twice as long
        # Not vecdot, which autocast computes in float16: the sum of 3584 squares of 4.3 is beyond its range.
        scale = normed.square().sum(-1, keepdim=True).div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return normed.mul_(scale).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Any) -> tuple[Any, ...]:
        x, weight, scale = ctx.saved_tensors
        of_normed, rows = (grad * weight).float(), x.float()
        # d(x·s)/dx = s − x·xᵀ·s³/width
        along = (of_normed * rows).sum(-1, keepdim=True).div_(x.shape[-1]).mul_(scale.pow(3))
        return of_normed.mul_(scale).addcmul_(rows, along, value=-1).to(x.dtype), None, None


class _GatedSiLU(torch.autograd.Function):
    """silu(gate) · up; recomputes silu(gate) in the backward pass."""

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


def _norm_by_torch(x: Any, weight: Any, epsilon: float) -> Any:
    """Use torch's kernel, which is one on a GPU, and which autocast gives float32."""
    return functional.rms_norm(x, weight.shape, weight, epsilon).to(x.dtype)


_OWN = _Kernels(_RMSNorm.apply, _GatedSiLU.apply)
_TORCH = _Kernels(_norm_by_torch, _GatedSiLU.apply)
