# ruff: noqa: N803  the kernels' own names of arguments
"""Stand-ins for kernels of GPUs that keep the documents of a packed row apart."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch.nn import functional
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback


def by_documents(plain: Callable[..., Any], tensors: list[torch.Tensor], ends: list[int], dim: int) -> torch.Tensor:
    """Call a function with the part of each document, [..., tokens at dim, ...]."""
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    parts = zip(*(tensor.split(lengths, dim) for tensor in tensors), strict=True)
    return torch.cat([plain(*part) for part in parts], dim)


class Kernels:
    """Stand-ins for the kernels of fla, causal-conv1d and mamba-ssm, with their signatures and requirements.

    They compute with transformers' own functions, document by document, and note the boundaries that they are given.
    """

    GLOBALS: ClassVar = {
        "chunk_gated_delta_rule": ("fla", "torch_chunk_gated_delta_rule"),
        "causal_conv1d_fn": ("causal_conv1d", "causal_conv1d_fn"),
        "mamba_chunk_scan_combined": ("mamba_ssm", "mamba2_chunk_scan"),
        "mamba_split_conv1d_scan_combined": ("mamba_ssm", "mamba2_split_conv1d_scan_combined"),
    }
    """Kernel → package, and transformers' function in place of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: str, *names: str, deaf: str = "") -> None:
        """Install kernels as transformers finds them; one of them may be deaf to boundaries."""
        self.deaf, self.borders = deaf, list[tuple[str, torch.Tensor]]()
        self.plain: dict[str, Callable[..., Any]] = {}
        modeling = import_module(f"transformers.models.{kind}.modeling_{kind}")
        for name in names:
            package, own = self.GLOBALS[name]
            self.plain[name] = getattr(modeling, own)
            monkeypatch.setitem(sys.modules, package, SimpleNamespace(**{name: getattr(self, name)}))
            taken = use_kernel_func_from_hub_with_fallback(name, package)(self.plain[name])
            monkeypatch.setattr(modeling, own, taken)

    def note(self, name: str, borders: torch.Tensor) -> bool:
        self.borders.append((name, borders))
        return name != self.deaf

    def chunk_gated_delta_rule(
        self, q: Any, k: Any, v: Any, g: Any, beta: Any, scale: Any = None, initial_state: Any = None,
        output_final_state: bool = False, use_qk_l2norm_in_kernel: bool = False, cu_seqlens: Any = None,
    ) -> Any:  # fmt: skip
        def plain(*inputs: Any) -> Any:
            query, key, value, decay, rate = inputs
            return self.plain["chunk_gated_delta_rule"](
                query, key, value, g=decay, beta=rate, initial_state=initial_state,
                output_final_state=output_final_state, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            )  # fmt: skip

        if cu_seqlens is None or not self.note("chunk_gated_delta_rule", cu_seqlens):
            return plain(q, k, v, g, beta)
        assert q.shape[0] == 1
        return by_documents(lambda *part: plain(*part)[0], [q, k, v, g, beta], cu_seqlens[1:].tolist(), 1), None

    def causal_conv1d_fn(
        self, x: Any, weight: Any, bias: Any = None, seq_idx: Any = None, initial_states: Any = None,
        return_final_states: bool = False, final_states_out: Any = None, activation: str | None = None,
    ) -> Any:  # fmt: skip
        plain = partial(self.plain["causal_conv1d_fn"], weight=weight, bias=bias, activation=activation)
        if seq_idx is None or not self.note("causal_conv1d_fn", seq_idx):
            return plain(x)
        assert x.stride(1) == 1  # channels last
        assert (seq_idx.dtype, seq_idx.shape) == (torch.int32, (x.shape[0], x.shape[2]))
        assert seq_idx.is_contiguous()
        return by_documents(plain, [x], seq_idx[0].bincount().cumsum(0).tolist(), 2)

    def mamba_chunk_scan_combined(
        self, x: Any, dt: Any, A: Any, B: Any, C: Any, chunk_size: int, D: Any = None, z: Any = None,
        dt_bias: Any = None, initial_states: Any = None, seq_idx: Any = None, cu_seqlens: Any = None,
        dt_softplus: bool = False, dt_limit: Any = (0.0, float("inf")), return_final_states: bool = False,
    ) -> Any:  # fmt: skip
        def plain(x: Any, dt: Any, B: Any, C: Any) -> Any:
            return self.plain["mamba_chunk_scan_combined"](
                x, dt, A, B, C, chunk_size=chunk_size, D=D, z=z, return_final_states=return_final_states,
                dt_bias=dt_bias, dt_softplus=dt_softplus, initial_states=initial_states, dt_limit=dt_limit,
            )  # fmt: skip

        if seq_idx is None or not self.note("mamba_chunk_scan_combined", seq_idx):
            return plain(x, dt, B, C)
        assert seq_idx.dtype == torch.int32
        return by_documents(plain, [x, dt, B, C], seq_idx[0].bincount().cumsum(0).tolist(), 1)

    def mamba_split_conv1d_scan_combined(
        self, zxbcdt: Any, conv1d_weight: Any, conv1d_bias: Any, dt_bias: Any, A: Any, D: Any, chunk_size: int,
        initial_states: Any = None, seq_idx: Any = None, outproj_weight: Any = None, outproj_bias: Any = None,
        headdim: Any = None, ngroups: int = 1,
    ) -> Any:  # fmt: skip
        """Take the weight of `out_proj` as it is, which is all that matters here of the kernel for training."""
        return functional.linear(zxbcdt[..., : outproj_weight.shape[1]], outproj_weight, outproj_bias)
