"""The reference for merged and exported models: base + adapter as trained, in float32 arithmetic."""

from __future__ import annotations

from pathlib import Path

from peft.tuners.lora.layer import ParamWrapper

from loratune.model.adapter.attach import keep_unpacked, load_adapter
from loratune.model.adapter.peft_stacks import StackRows
from loratune.model.base import load_base
from loratune.model.hardware import detect_hardware
from loratune.model.weights.mapped import load_mapped
from loratune.model.weights.stack import stacks_of
from loratune.protocols import AdaptedModel
from loratune.recipe.sections import ModelSettings


def load_reference(settings: ModelSettings, base: Path, adapter: Path) -> AdaptedModel:
    """PEFT's own model: the adapter's layers beside the base's, which is quantised if it was in training.

    Args:
        settings: settings of the base in training.
        base: folder of the base.
        adapter: PEFT folder.

    Raises:
        LoratuneError: the adapter does not match, or this machine cannot quantise.
    """
    if settings.quantization == "none":
        adapted = load_adapter(load_mapped(base), adapter, keep_dtype=True)
        _update_stacks(adapted)
        return adapted
    # Flash attention would cast to the config's type.
    exact = settings.model_copy(update={"compute_dtype": "float32", "attn_implementation": "sdpa"})
    quantized = load_base(exact, base, detect_hardware())
    keep_unpacked(quantized)  # the packed form computes in bfloat16
    return load_adapter(quantized, adapter).float().eval()


def _update_stacks(model: AdaptedModel) -> None:
    """Add PEFT's update of a stack to each matrix that is read, since PEFT's layer computes that of the whole stack."""
    for layer in [module for module in model.modules() if isinstance(module, ParamWrapper)]:
        rows = StackRows(layer, model.active_adapter)
        stacks_of(layer.get_base_layer())[layer.parameter_name].changes.append(rows.merged_matrix)
        layer.forward = layer.base_layer.__call__
