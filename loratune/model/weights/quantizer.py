"""Quantises a model while transformers loads it: linear layers as bitsandbytes does, and stacks of matrices too.

transformers reads one parameter after another, and quantises it before the next one, so the model never exists in 16
bits.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from loratune.model.architecture.roles import expert_stacks
from loratune.model.memory import return_freed_memory
from loratune.model.weights.quantized_stack import quantize_stack, use_quantized_stacks

METHOD = "nf4_with_stacks"


class StacksConfig(BitsAndBytesConfig):
    """A 4-bit config that transformers passes on to the quantiser below."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.quant_method = METHOD


@register_quantizer(METHOD)
class StacksQuantizer(Bnb4BitHfQuantizer):
    """Quantises linear layers and stacks of matrices."""

    def _process_model_before_weight_loading(self, model: Any, *arguments: Any, **settings: Any) -> None:
        self.stacks = set(expert_stacks(model))
        super()._process_model_before_weight_loading(model, *arguments, **settings)

    def param_needs_quantization(self, model: Any, param_name: str, **settings: Any) -> bool:
        """Return whether a parameter is quantised."""
        return param_name in self.stacks or super().param_needs_quantization(model, param_name, **settings)

    def get_quantize_ops(self) -> Any:
        """Return the operation that quantises a parameter."""
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model: Any, **settings: Any) -> Any:
        use_quantized_stacks(model, self.quantization_config.bnb_4bit_compute_dtype)
        return super()._process_model_after_weight_loading(model, **settings)


class _Quantize(Bnb4bitQuantize):
    def convert(self, input_dict: dict[str, Any], **settings: Any) -> dict[str, torch.Tensor]:
        if not self.hf_quantizer.stacks.issuperset(input_dict):
            converted: dict[str, torch.Tensor] = super().convert(input_dict, **settings)
            return converted
        double = self.hf_quantizer.quantization_config.bnb_4bit_use_double_quant
        values = {name: one[0] if isinstance(one, list) else one for name, one in input_dict.items()}
        quantised = {name: quantize_stack(one, double) for name, one in values.items()}
        # The 16 bits of earlier stacks are holes between what is kept, and those of the next one may not fit into them.
        return_freed_memory()
        return quantised
