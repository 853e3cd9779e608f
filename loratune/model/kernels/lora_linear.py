"""Computes a frozen linear layer and its LoRA branch in one autograd function, in place of PEFT's separate passes.

PEFT casts the activations to the adapter's dtype and adds the branch in separate passes, which on a CPU take as long as
the matrix products. Parameters, their names and the saved files stay PEFT's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn
from torch.autograd.function import once_differentiable

from loratune.model.kernels.lora_inference import mixed_lora_output
from loratune.model.kernels.plain_layers import LayerState, base_classes, is_plain, state_of, state_with, suits
from loratune.model.kernels.rounded_weights import RoundedWeight, watch_optimizers
from loratune.protocols import CausalModel

_MAX_DROPOUT = 254 / 256
"""Maximum rate that one random byte per element can represent."""


def use_fused_lora(model: CausalModel) -> int:
    """Compute every plain LoRA layer in one function; PEFT keeps the others.

    A layer is plain if it has one active adapter on a frozen `nn.Linear` or a quantised layer, without DoRA or other
    variants, bias or merge. Each call compares the layer's state, and uses PEFT's forward if adapters are
    disabled, merged, several, or named per row, and under autocast.

    Args:
        model: a PEFT model.

    Returns:
        The number of replaced layers.
    """
    watch_optimizers()
    taken = 0
    for layer in model.modules():
        if not isinstance(vars(layer).get("forward"), _FusedForward):
            is_candidate = type(layer) in base_classes() and "forward" not in vars(layer)
            if not is_candidate or not is_plain(state_of(layer)):
                continue
            layer.forward = _FusedForward(layer)
        taken += 1
    return taken


class _Branch:
    """A plain layer's base and LoRA branch."""

    def __init__(self, state: LayerState) -> None:
        self.base, self._dropout = state.base, state.dropout
        self.a, self.b = RoundedWeight(state.down.weight), RoundedWeight(state.up.weight)

    @property
    def rate(self) -> float:
        """Dropout rate; 0 outside training."""
        dropout = self._dropout
        return float(dropout.p) if dropout.training and type(dropout) is nn.Dropout else 0.0

    def output(self, x: Any, scaling: float) -> Any:
        """Return the layer's output in inference mode: an autograd function would double the host's time."""
        dense = x.contiguous()  # a bfloat16 product of strided rows is a hundred times slower on a CPU
        y = self.base(dense)
        reduced = _rows(dense) @ self.a.times(1, x.dtype).t()
        _rows(y).addmm_(reduced, self.b.times(1, x.dtype).t(), alpha=scaling)
        return y


class _FusedForward:
    """Replacement forward of a layer: (…, in) → (…, out) in the dtype of x."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._state: LayerState | None = None
        self._branch: _Branch | None = None

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        layer = self._layer
        if not args and kwargs.keys() == {"adapter_names"} and self._can_mix(x, kwargs["adapter_names"]):
            return mixed_lora_output(layer, x, tuple(kwargs["adapter_names"]))
        state = state_of(layer)
        if state != self._state:
            self._state, self._branch = state, _Branch(state) if state is not None and is_plain(state) else None
        branch = self._branch
        if state is None or branch is None or args or kwargs or not suits(state, x):
            return type(layer).forward(layer, x, *args, **kwargs)
        rate, scaling = branch.rate, layer.scaling[state.adapter]
        if rate > _MAX_DROPOUT:
            return type(layer).forward(layer, x)
        if torch.is_inference_mode_enabled() and not rate:
            return branch.output(x, scaling)
        call = _Call(branch, scaling, rate)
        return _FusedLinear.apply(x, branch.base.bias, branch.a.weight, branch.b.weight, call)

    def _can_mix(self, x: Any, names: list[str] | None) -> bool:
        """Return whether every row's adapter is plain, in inference mode."""
        layer = self._layer
        if not names or not torch.is_inference_mode_enabled() or layer.training:
            return False
        if layer._disable_adapters or layer.merged_adapters:
            return False
        states = [state_with(layer, name) for name in set(names) if name in layer.lora_A]
        return all(
            state is not None and is_plain(state) and suits(state, x) and not state.down.weight.is_inference()
            for state in states
        )


class _Call(NamedTuple):
    """The arguments of a call other than tensors with gradients."""

    branch: _Branch
    scaling: float
    dropout: float
    """Dropout rate; 0 outside training."""


class _FusedLinear(torch.autograd.Function):
    """y = base(x) + scaling · dropout(x) Aᵀ Bᵀ, with all products in the dtype of x.

    Shapes: x (…, in), A (rank, in), B (out, rank), y (…, out). A and B may be float32 with a narrower x: they are
    rounded for the products, which accumulate in float32, and their gradients have their own dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, bias: Any, lora_a: Any, lora_b: Any, call: _Call) -> Any:
        """Save x, the (rows, rank) input of B and, with dropout, a mask of one byte per element of x."""
        branch, scaling, rate = call
        dense = x.contiguous()  # a bfloat16 product of strided rows is a hundred times slower on a CPU
        # Not a 2-D view: later operations may change y in place, which autograd forbids for a view made here.
        y = branch.base(dense)
        dropped, mask, gain = _dropout(_rows(dense), rate)
        scale = scaling / (1 - rate) / gain  # of A, which both passes multiply by
        reduced = dropped @ branch.a.times(scale, x.dtype).t()
        _rows(y).addmm_(reduced, branch.b.times(1, x.dtype).t())
        _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_a else None, reduced if needs_b else None, mask, lora_a, lora_b)
        ctx.branch, ctx.bias_dtype, ctx.scale, ctx.gain = branch, None if bias is None else bias.dtype, scale, gain
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Any) -> tuple[Any, ...]:
        """Return the gradients of x, bias, A and B, each only if needed."""
        x, reduced, mask, lora_a, lora_b = ctx.saved_tensors
        needs_x, needs_bias, needs_a, needs_b, _ = ctx.needs_input_grad
        grad_x = grad_bias = grad_a = grad_b = None
        rows, branch = _rows(grad.contiguous()), ctx.branch
        if mask is not None and not mask.is_cuda:
            mask = mask.to(grad.dtype)  # once: both products below use it, and a GPU converts as it reads
        if needs_bias:
            grad_bias = rows.sum(0, dtype=ctx.bias_dtype)
        if needs_b:
            grad_b = _long_product(rows, reduced, lora_b.dtype)
        if needs_x or needs_a:
            through_b = rows @ branch.b.times(1, grad.dtype)  # (rows, rank)
        if needs_a:
            grad_a = _gradient_of_a(through_b, _rows(x.contiguous()), mask, ctx.scale * ctx.gain, lora_a.dtype)
        if needs_x:
            grad_x = rows @ _dense_weight(branch.base, grad.dtype)
            _add_branch(grad_x, through_b, branch.a.times(ctx.scale, grad.dtype), mask, ctx.gain)
            grad_x = grad_x.view(*grad.shape[:-1], lora_a.shape[1])
        return grad_x, grad_bias, grad_a, grad_b, None


def _rows(tensor: Any) -> Any:
    """View (…, features) as (rows, features)."""
    return tensor.view(-1, tensor.shape[-1])


def _dropout(rows: Any, rate: float) -> tuple[Any, Any, float]:
    """Drop elements of (rows, features).

    Returns:
        What is left, the mask (None without dropout), and the factor that the rest has been multiplied by already.
    """
    if not rate:
        return rows, None, 1.0
    return _dropout_by_kernel(rows, rate) if rows.is_cuda else _dropout_by_bytes(rows, rate)


def _dropout_by_kernel(rows: Any, rate: float) -> tuple[Any, Any, float]:
    dropped, mask = torch.native_dropout(rows, rate, True)
    return dropped, mask, 1 / (1 - rate)


def _dropout_by_bytes(rows: Any, rate: float) -> tuple[Any, Any, float]:
    mask = _draw_mask(rows, rate)
    return rows * mask, mask, 1.0


def _draw_mask(x: Any, rate: float) -> Any:
    """Draw a dropout mask: int8, 1 to keep and 0 to drop, as (rows, features).

    On a CPU, one random byte per element is much faster than torch's Bernoulli numbers, which would take as long as the
    layer's products. A byte has 256 rates; each row randomly uses the one above or below, so that the expected rate is
    exact.
    """
    rows = _rows(x)
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device).random_(-(2**63), None)
    dropped = torch.rand(len(rows), 1, device=x.device).add_(256 * rate).floor_()
    mask = torch.empty(rows.shape, dtype=torch.int8, device=x.device)
    # As int8, the bytes range from -128 to 127.
    return torch.ge(words.view(torch.int8)[: x.numel()].view(rows.shape), dropped.sub_(128).to(torch.int8), out=mask)


def _gradient_of_a(through_b: Any, rows: Any, mask: Any | None, scale: float, dtype: Any) -> Any:
    """Return (rank, in) of (rows, rank) and the layer's input, in a dtype."""
    if mask is not None and mask.is_cuda:  # one kernel masks and scales
        rows = torch.ops.aten.native_dropout_backward(rows, mask, scale)
        return _long_product(through_b, rows, dtype)
    return _long_product(through_b, rows if mask is None else rows * mask, dtype).mul_(scale)


def _long_product(left: Any, right: Any, dtype: Any) -> Any:
    """Return leftᵀ right, a sum over all rows, in a dtype.

    cuBLAS splits such a sum, and would add its parts in the dtype of the factors unless the result has another.
    """
    if left.is_cuda and dtype == torch.float32 and left.dtype != dtype:
        return torch.mm(left.t(), right, out_dtype=dtype)
    return (left.t() @ right).to(dtype)


def _add_branch(grad_x: Any, through_b: Any, lora_a: Any, mask: Any | None, gain: float) -> None:
    """Add the branch's contribution to a gradient (rows, in) in place."""
    if mask is None:
        grad_x.addmm_(through_b, lora_a)
    else:
        grad_x.addcmul_(through_b @ lora_a, mask, value=gain)


def _dense_weight(base: Any, dtype: Any) -> Any:
    """Return the base's (out, in) weight. A quantised one is dequantised on each call, so that no dense copy stays."""
    if type(base) is nn.Linear:
        return base.weight
    if hasattr(base, "weight_in"):  # LLM.int8
        return base.weight_in(dtype)
    dense = base.dequantised() if hasattr(base, "dequantised") else dequantize_bnb_weight(base.weight)
    return dense.to(dtype)
