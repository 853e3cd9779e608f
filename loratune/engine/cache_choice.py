"""Chooses a model's KV cache: pages on a GPU, growing slots on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from loratune.engine.kv_cache import BatchedKVCache, KVCache
from loratune.engine.paged_cache import PAGE, Kernel, PagedBatch, PagedKVCache
from loratune.engine.slot_states import rounded_slots
from loratune.model.architecture.layer_memory import has_states
from loratune.model.architecture.structure import head_size, key_value_heads, layer_count, text_config
from loratune.model.kernels.packed_attention import VARLEN_TOLERANCE, varlen_attn
from loratune.model.nvidia import FLASH_CAPABILITY
from loratune.multiples import round_up
from loratune.protocols import CausalModel

CACHE_SHARE = 0.7
"""Share of the memory that is free after loading the model, for the KV cache."""


def make_cache(
    model: CausalModel,
    slots: int,
    budget_bytes: float | None,
    filled: Callable[[], BatchedKVCache],
    uses_pages: bool = True,
) -> KVCache:
    """Return an empty KV cache.

    Args:
        model: a causal language model, without PEFT's wrapper.
        slots: maximum number of running sequences.
        budget_bytes: limit of its memory. None for no limit on a CPU, and for what is free on a GPU.
        filled: returns a cache that holds one token of one sequence, whose size is measured.
        uses_pages: whether the cache on a GPU is one of pages.
    """
    layers, with_states = layer_count(model.config), has_states(model.config)
    is_on_gpu = model.device.type == "cuda"
    if budget_bytes is None and not is_on_gpu:
        return BatchedKVCache(layers, has_states=with_states)
    measured = filled()
    token_bytes, slot_bytes = max(1, measured.token_bytes), measured.states.slot_bytes
    if budget_bytes is None:
        budget_bytes = CACHE_SHARE * torch.cuda.mem_get_info(model.device)[0]
    if not (is_on_gpu and uses_pages):
        return BatchedKVCache(layers, int(budget_bytes / token_bytes), with_states, -(-slot_bytes // token_bytes))
    most = slots * round_up(text_config(model.config).max_position_embeddings, PAGE)
    left = max(0.0, budget_bytes - rounded_slots(slots) * slot_bytes)
    pages = min(int(left / token_bytes) // PAGE - 1, most // PAGE)  # without the one for padding
    return PagedKVCache(layers, max(1, pages) * PAGE, paged_kernel(model), with_states)


def paged_kernel(model: CausalModel) -> Kernel | None:
    """Return torch's attention over pages as far as it works for a model on its GPU.

    That depends on the card, on torch, and on which flash attention is installed, so it is tried.
    """
    is_half = model.dtype in (torch.bfloat16, torch.float16)
    if varlen_attn is None or not is_half or torch.cuda.get_device_capability(model.device) < FLASH_CAPABILITY:
        return None
    kernels = (Kernel(varlen_attn, reads_tables) for reads_tables in (True, False))
    return next((kernel for kernel in kernels if works(kernel, model)), None)


@torch.inference_mode()  # type: ignore[untyped-decorator]
def works(kernel: Kernel, model: CausalModel) -> bool:
    """Return whether a kernel gives what sdpa gives, with and without a window, for prompts and single tokens."""
    config, tables = model.config, [[4], [1, 3] if kernel.reads_tables else [2, 3]]
    heads, key_heads, size = text_config(config).num_attention_heads, key_value_heads(config), head_size(config)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(model.device, model.dtype)

    key, value = (random(5, PAGE, key_heads, size) for _ in range(2))
    numbers = torch.tensor([[4, 0], tables[1]], dtype=torch.int32).to(model.device)
    try:
        for count in (1, 3):
            batch = [0, 1], [4, PAGE + 9], [count, count], model.device
            by_kernel, by_sdpa = (
                PagedBatch(*batch, tables=tables, numbers=numbers, kernel=one) for one in (kernel, None)
            )
            query = random(2, heads, by_sdpa.width, size)
            for window in (None, 5):
                found, expected = (
                    one.attend(query, key, value, window, None)[:, -count:] for one in (by_kernel, by_sdpa)
                )
                if not (found - expected).norm() <= VARLEN_TOLERANCE * expected.norm():
                    return False
    except Exception:  # a kernel that lacks something may raise anything
        return False
    return True
