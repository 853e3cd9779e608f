"""Tries a package: a small computation, compared with the same one by torch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional

from loratune.doctor.facts import Trial
from loratune.model.nvidia import FLASH_CAPABILITY

BOUND = 0.02
"""Largest relative difference of two ways to compute in bfloat16 or float16, as a norm."""
LARGEST_ROUNDING = 0.2
"""Of nf4, as a share of the weights. It is 0.09 of a normal distribution; codes without meaning give more than 1."""
ONLY_IMPORTED = Trial(0.0, BOUND, has_computed=False)
"""Of a package that this machine has no use for."""
ROWS, WIDTH, HEADS, TOKENS = 16, 256, 4, 96


def try_package(package: str) -> Trial:
    """Import a package, and compute with it on the GPU; without a GPU only bitsandbytes computes.

    Args:
        package: its name, or `torch` for a product on each GPU.
    """
    torch.manual_seed(0)
    match package:
        case "torch":
            return _products()
        case "bitsandbytes":
            return _nf4()
        case "flash-attn":
            return _flash_attention()
        case "liger-kernel":
            return _liger_norm()
        case "flash-linear-attention":
            return _gated_delta_rule()
        case "causal-conv1d":
            return _convolution()
    raise ValueError(package)


def _products() -> Trial:
    """Products of matrices in half precision on each GPU, and the CPU's in float64."""
    found: list[float | None] = []
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        dtype = _half(device)
        x, weight = torch.randn(ROWS, WIDTH), torch.randn(WIDTH, WIDTH)
        expected = x.to(dtype).double() @ weight.to(dtype).double()
        found.append(_difference(x.to(device, dtype) @ weight.to(device, dtype), expected))
    return Trial(None if None in found else max(one or 0.0 for one in found), BOUND)


def _nf4() -> Trial:
    """A product with a matrix in nf4, and with the matrix that its codes stand for, unpacked here."""
    import bitsandbytes
    from bitsandbytes import functional as quantisation

    bnb: Any = bitsandbytes  # partly untyped
    device = _gpu() or torch.device("cpu")
    dtype = torch.bfloat16 if device.type == "cpu" else _half(device)
    weight, x = torch.randn(WIDTH, WIDTH).to(device, dtype), torch.randn(ROWS, WIDTH).to(device, dtype)
    packed, state = quantisation.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    codes = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), dim=-1).flatten().long()
    meant = (state.code.float()[codes].view(-1, 64) * state.absmax.float()[:, None]).view(WIDTH, WIDTH)
    found = bnb.matmul_4bit(x, packed.t(), quant_state=state)
    rounding = _difference(meant, weight)
    if rounding is None or rounding > LARGEST_ROUNDING:
        return Trial(rounding, BOUND)
    return Trial(_difference(found, x.double() @ meant.double().T), BOUND)


def _flash_attention() -> Trial:
    from flash_attn import flash_attn_func

    device = _gpu(FLASH_CAPABILITY)
    if device is None:
        return ONLY_IMPORTED
    query, key, value = (torch.randn(1, TOKENS, HEADS, 64).to(device, torch.bfloat16) for _ in range(3))
    found = flash_attn_func(query, key, value, causal=True)
    first, second, third = (part.transpose(1, 2).double() for part in (query, key, value))
    expected = functional.scaled_dot_product_attention(first, second, third, is_causal=True)
    return Trial(_difference(found, expected.transpose(1, 2)), BOUND)


def _liger_norm() -> Trial:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    device = _gpu()
    if device is None:
        return ONLY_IMPORTED
    x, weight = torch.randn(ROWS, WIDTH, device=device), torch.rand(WIDTH, device=device)
    found = LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False)
    return Trial(_difference(found, functional.rms_norm(x.double(), (WIDTH,), weight.double(), 1e-6)), BOUND)


def _gated_delta_rule() -> Trial:
    """fla's kernel for linear attention in chunks, and the recurrence that it stands for, token by token."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    device = _gpu()
    if device is None:
        return ONLY_IMPORTED
    query, key, value = (torch.randn(1, TOKENS, HEADS, 64, device=device) for _ in range(3))
    query, key = functional.normalize(query, dim=-1), functional.normalize(key, dim=-1)
    decay = functional.logsigmoid(torch.randn(1, TOKENS, HEADS, device=device))
    halves = [part.bfloat16() for part in (query, key, value, torch.rand(1, TOKENS, HEADS, device=device))]
    found, _ = chunk_gated_delta_rule(*halves[:3], g=decay, beta=halves[3], scale=1.0)
    return Trial(_difference(found[0], _recurrence(*(part[0].double() for part in (*halves, decay)))), BOUND)


def _recurrence(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rate: torch.Tensor, decay: torch.Tensor
) -> torch.Tensor:
    """Linear attention by the gated delta rule, token by token.

    Args:
        query, key, value: [tokens, heads, size].
        rate: share of a value that replaces what is known under its key, [tokens, heads].
        decay: logarithm of what is kept of the state, [tokens, heads].
    """
    state, outputs = value.new_zeros(*key.shape[1:], value.shape[-1]), []
    for token in range(len(query)):
        state = state * decay[token].exp()[:, None, None]
        known = torch.einsum("hkv,hk->hv", state, key[token])
        change = (value[token] - known) * rate[token][:, None]
        state = state + torch.einsum("hk,hv->hkv", key[token], change)
        outputs.append(torch.einsum("hkv,hk->hv", state, query[token]))
    return torch.stack(outputs)


def _convolution() -> Trial:
    from causal_conv1d import causal_conv1d_fn

    device = _gpu()
    if device is None:
        return ONLY_IMPORTED
    x, weight = torch.randn(1, WIDTH, TOKENS, device=device), torch.randn(WIDTH, 4, device=device)
    expected = functional.conv1d(x.double(), weight.double()[:, None], padding=3, groups=WIDTH)[..., :TOKENS]
    return Trial(_difference(causal_conv1d_fn(x, weight, None, activation="silu"), functional.silu(expected)), BOUND)


def _gpu(least: tuple[int, int] = (0, 0)) -> torch.device | None:
    """Return the first GPU, if there is one that has at least a compute capability."""
    has_one = torch.cuda.is_available() and torch.cuda.get_device_capability(0) >= least
    return torch.device("cuda", 0) if has_one else None


def _half(device: torch.device) -> torch.dtype:
    """Return the type of 16 bits that a GPU computes in; loratune takes float16 where bfloat16 is emulated."""
    with torch.cuda.device(device):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float | None:
    """Norm of the difference of two results, relative to the second; None if the first is not finite."""
    found, expected = found.double().cpu(), expected.double().cpu()
    share = float((found - expected).norm() / expected.norm())
    return share if math.isfinite(share) else None
