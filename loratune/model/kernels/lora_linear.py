"""Computes a frozen linear layer and its LoRA branch in one autograd function, in place of PEFT's separate passes.

PEFT casts the activations to the adapter's dtype and adds the branch in separate passes, which on a CPU take as long as
the matrix products. Parameters, their names and the saved files stay PEFT's.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.lora import Linear
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn
from torch.autograd.function import once_differentiable

from loratune.model.kernels.few_rows import takes_few_rows
from loratune.model.kernels.lora_inference import lora_output, mixed_lora_output
from loratune.protocols import CausalModel

_MAX_DROPOUT = 254 / 256
"""Maximum rate that one random byte per element can represent."""


def use_fused_lora(model: CausalModel) -> int:
    """Compute every plain LoRA layer in one function; PEFT keeps the others.

    A layer is plain if it has one active adapter on a frozen `nn.Linear` or bitsandbytes `Linear4bit`, without DoRA or
    other variants, bias or merge. Each call checks the layer's state, and uses PEFT's forward if adapters are disabled,
    merged, several, or named per row, and under autocast.

    Args:
        model: a PEFT model.

    Returns:
        The number of replaced layers.
    """
    taken = 0
    for layer in model.modules():
        if not _is_taken(layer):
            if "forward" in vars(layer) or _plain_adapter(layer) is None:
                continue
            layer.forward = MethodType(_forward, layer)
        taken += 1
    return taken


def _is_taken(layer: Any) -> bool:
    return getattr(vars(layer).get("forward"), "__func__", None) is _forward


def _forward(layer: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Replacement forward of a layer: (…, in) → (…, out) in the dtype of x."""
    if torch.is_inference_mode_enabled() and not args and _is_for_inference(layer, x, **kwargs):
        names = kwargs.get("adapter_names")
        return mixed_lora_output(layer, x, tuple(names)) if names else lora_output(layer, x, layer.active_adapters[0])
    adapter = None if args or kwargs else _plain_adapter(layer)
    if adapter is None or not _suits(layer, adapter, x):
        return type(layer).forward(layer, x, *args, **kwargs)
    dropout = layer.lora_dropout[adapter]
    rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    base = layer.base_layer
    plan = _Plan(base, layer.scaling[adapter], rate)
    return _FusedLinear.apply(x, base.bias, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, plan)


def _is_for_inference(layer: Any, x: Any, adapter_names: list[str] | None = None, **unknown: Any) -> bool:
    """Return whether `lora_inference` computes the layer: its rows' adapters, or the active one, are plain.

    It has to notice changes of their matrices, which torch does not count for tensors made in inference mode.
    """
    names = adapter_names or layer.active_adapters
    if unknown or layer.training or layer.disable_adapters or layer.merged or not (adapter_names or len(names) == 1):
        return False
    own = [name for name in set(names) if name in layer.lora_A]
    return bool(own or adapter_names) and all(
        _is_plain(layer, name) and _suits(layer, name, x) and not layer.lora_A[name].weight.is_inference()
        for name in own
    )


@functools.cache
def _base_classes() -> dict[type, type]:
    """Return PEFT's layer class → required class of its base layer."""
    classes: dict[type, type] = {Linear: nn.Linear}
    if is_bnb_4bit_available():
        layers = importlib.import_module("peft.tuners.lora.bnb")
        classes[layers.Linear4bit] = layers.bnb.nn.Linear4bit
    return classes


def _plain_adapter(layer: Any) -> str | None:
    """Return the name of the single active adapter if the layer is just base and branch, otherwise None."""
    if type(layer) not in _base_classes() or layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    adapter: str = layer.active_adapters[0]
    return adapter if adapter in layer.lora_A and _is_plain(layer, adapter) else None


def _is_plain(layer: Any, adapter: str) -> bool:
    """Return whether one of a layer's adapters is just a branch beside its base."""
    if adapter in layer.lora_variant or not layer.cast_input_dtype_enabled:
        return False
    dropout, down, up = layer.lora_dropout[adapter], layer.lora_A[adapter], layer.lora_B[adapter]
    has_plain_dropout = _is_bare(dropout, nn.Identity) or (_is_bare(dropout, nn.Dropout) and dropout.p <= _MAX_DROPOUT)
    has_plain_branch = _is_bare(down, nn.Linear) and _is_bare(up, nn.Linear) and up.bias is None
    base_class = _base_classes()[type(layer)]
    has_known_base = _is_bare(layer.base_layer, base_class) and _has_frozen_weight(layer.base_layer)
    if not (has_plain_dropout and has_plain_branch and has_known_base):
        return False
    known_dtypes = (torch.float32, _base_dtype(layer.base_layer))
    return down.weight.dtype == up.weight.dtype and down.weight.dtype in known_dtypes


def _is_bare(module: Any, kind: type) -> bool:
    """Return whether a module is exactly of a class, without hooks or a replaced forward."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
        "forward" in vars(module) and not takes_few_rows(module),
    )
    return type(module) is kind and not any(hooks)


def _has_frozen_weight(base: Any) -> bool:
    """Return whether a frozen base has a plain weight, or one in bitsandbytes' training format."""
    if base.weight.requires_grad:
        return False
    if type(base) is nn.Linear:
        return type(base.weight) is nn.Parameter
    state = base.weight.quant_state
    return state is not None and not getattr(state, "packing_format_for_cpu", False)


def _base_dtype(base: Any) -> Any:
    """Return the base's compute dtype; None for a 4-bit layer that uses its first input's."""
    return base.weight.dtype if type(base) is nn.Linear else base.compute_dtype


def _suits(layer: Any, adapter: str, x: Any) -> bool:
    """Return whether the whole layer can compute in the dtype of x."""
    return (
        not torch.is_autocast_enabled(x.device.type)
        and _base_dtype(layer.base_layer) in (x.dtype, None)
        and layer.lora_A[adapter].weight.dtype in (x.dtype, torch.float32)
    )


@dataclass(frozen=True)
class _Plan:
    """The arguments of a call other than tensors with gradients."""

    base: Any
    scaling: float
    dropout: float
    """Dropout rate; 0 outside training."""


class _FusedLinear(torch.autograd.Function):
    """y = base(x) + scaling · dropout(x) Aᵀ Bᵀ, with all products in the dtype of x.

    Shapes: x (…, in), A (rank, in), B (out, rank), y (…, out). A and B may be float32 with a narrower x: they are
    rounded for the products, which accumulate in float32, and their gradients have their own dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, bias: Any, lora_a: Any, lora_b: Any, plan: _Plan) -> Any:
        """Save x, the (rows, rank) input of B and, with dropout, a mask of one byte per element of x."""
        dense = x.contiguous()  # a bfloat16 product of strided rows is a hundred times slower on a CPU
        # Not a 2-D view: later operations may change y in place, which autograd forbids for a view made here.
        y = plan.base(dense)
        mask = _draw_mask(dense, plan.dropout) if plan.dropout else None
        scale = plan.scaling / (1 - plan.dropout)
        reduced = _masked(_rows(dense), mask) @ lora_a.to(x.dtype).t()
        _rows(y).addmm_(reduced, lora_b.to(x.dtype).t(), alpha=scale)
        _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_a else None, reduced if needs_b else None, mask, lora_a, lora_b)
        ctx.base, ctx.bias_dtype, ctx.scale = plan.base, None if bias is None else bias.dtype, scale
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Any) -> tuple[Any, ...]:
        """Return the gradients of x, bias, A and B, each only if needed."""
        x, reduced, mask, lora_a, lora_b = ctx.saved_tensors
        needs_x, needs_bias, needs_a, needs_b, _ = ctx.needs_input_grad
        grad_x = grad_bias = grad_a = grad_b = None
        rows = _rows(grad.contiguous())
        mask = None if mask is None else mask.to(grad.dtype)  # once: both products below use it
        if needs_bias:
            grad_bias = rows.sum(0, dtype=ctx.bias_dtype)
        if needs_b:
            grad_b = (rows.t() @ reduced).to(lora_b.dtype).mul_(ctx.scale)
        if needs_x or needs_a:
            through_b = rows @ lora_b.to(grad.dtype)  # (rows, rank)
        if needs_a:
            grad_a = (through_b.t() @ _masked(_rows(x.contiguous()), mask)).to(lora_a.dtype).mul_(ctx.scale)
        if needs_x:
            grad_x = rows @ _dense_weight(ctx.base, grad.dtype)
            _add_branch(grad_x, through_b, lora_a.to(grad.dtype), mask, ctx.scale)
            grad_x = grad_x.view(*grad.shape[:-1], lora_a.shape[1])
        return grad_x, grad_bias, grad_a, grad_b, None


def _rows(tensor: Any) -> Any:
    """View (…, features) as (rows, features)."""
    return tensor.view(-1, tensor.shape[-1])


def _draw_mask(x: Any, rate: float) -> Any:
    """Draw a dropout mask: int8, 1 to keep and 0 to drop, as (rows, features).

    One random byte per element is much faster than torch's Bernoulli numbers, which would take as long as the layer's
    products. A byte has 256 rates; each row randomly uses the one above or below, so that the expected rate is exact.
    """
    rows = _rows(x)
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    dropped = torch.rand(len(rows), 1, device=x.device).add_(256 * rate).floor_()
    mask = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    # As int8, the bytes range from -128 to 127.
    return torch.ge(words.view(torch.int8)[: x.numel()].view(rows.shape), dropped.sub_(128).to(torch.int8), out=mask)


def _masked(rows: Any, mask: Any | None) -> Any:
    return rows if mask is None else rows * mask


def _add_branch(grad_x: Any, through_b: Any, lora_a: Any, mask: Any | None, scale: float) -> None:
    """Add the branch's contribution to a gradient (rows, in) in place."""
    if mask is None:
        grad_x.addmm_(through_b, lora_a, alpha=scale)
    else:
        grad_x.addcmul_(through_b @ lora_a, mask, value=scale)


def _dense_weight(base: Any, dtype: Any) -> Any:
    """Return the base's (out, in) weight. A 4-bit weight is dequantised on each call, so that no dense copy stays."""
    return base.weight if type(base) is nn.Linear else dequantize_bnb_weight(base.weight).to(dtype)
