"""A pass through a mixture's experts that takes one matrix of a stack at a time, and waits for a GPU once.

transformers' own pass of this kind asks a GPU several times for each expert which tokens are sent to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


def declares_layout(module: Any) -> bool:
    """Return whether a module says how its stacks lie, as transformers' implementations for all experts need it."""
    return hasattr(module, "is_transposed") and not module.has_post_expert_norm


def by_single_matrices(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute the experts that some token is sent to, one after the other.

    Args:
        module: it declares its layout.
        hidden_states: [tokens, width].
        top_k_index: the experts of each token, int64 [tokens, experts of a token].
        top_k_weights: of the same shape.

    Returns:
        [tokens, width], in the dtype of the hidden states.
    """
    experts, order = top_k_index.flatten().sort()
    numbers = torch.arange(module.num_experts, device=experts.device)
    ends = torch.searchsorted(experts, numbers, right=True).tolist()  # the only values that are read
    counts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    rows = hidden_states[order // top_k_index.shape[1]].split(counts)
    outputs = [_output(module, number, part) for number, part in enumerate(rows) if counts[number]]
    weighted = torch.cat(outputs) * top_k_weights.flatten()[order].unsqueeze(-1)
    of_tokens = weighted[order.argsort()].unflatten(0, top_k_index.shape)
    return of_tokens.sum(dim=1).to(hidden_states.dtype)


def _output(module: Any, number: int, rows: torch.Tensor) -> torch.Tensor:
    """Return what an expert makes of the rows that are sent to it."""
    if module.has_gate:
        inner = module._apply_gate(_product(module, "gate_up_proj", number, rows))
    else:
        inner = module.act_fn(_product(module, "up_proj", number, rows))
    return _product(module, "down_proj", number, inner)


def _product(module: Any, name: str, number: int, rows: torch.Tensor) -> torch.Tensor:
    matrix = getattr(module, name)[number]
    output = rows @ matrix if module.is_transposed else functional.linear(rows, matrix)
    return output + getattr(module, f"{name}_bias")[number] if module.has_bias else output
