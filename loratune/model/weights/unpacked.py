"""Keeps bitsandbytes from repacking 4-bit weights for a CPU, where that form does not serve."""

from __future__ import annotations

from loratune.protocols import CausalModel

PACKED_ROWS = 32
"""Rows of a block of 4-bit weights that bitsandbytes has repacked for a CPU."""


def keep_unpacked(model: CausalModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights at the first validation on a CPU.

    The packed form only supports inference: the next training step would fail with "a view of a leaf Variable that
    requires grad is being used in an in-place operation".
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def keep_odd_sizes_unpacked(model: CausalModel) -> None:
    """Keep bitsandbytes from repacking 4-bit matrices for a CPU in blocks that their sizes are no multiples of."""
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and hasattr(module, "support_avx512bf16_for_cpu"):
            rows, columns = state.shape
            if rows % PACKED_ROWS or columns % state.blocksize:
                module.support_avx512bf16_for_cpu = False
