"""Has recurrent layers call their modules in training."""

from __future__ import annotations

from typing import Any

from loratune.model.architecture.recurrent import recurrent_modules
from loratune.model.architecture.structure import decoder_of
from loratune.protocols import CausalModel


def call_modules_in_training(model: CausalModel) -> int:
    """Have recurrent layers compute in training as they do in inference.

    A GPU has a kernel for training through Mamba that takes the weight of `out_proj` and does not call the module. Its
    LoRA would be without effect and gradient. A layer takes that kernel if it is in training mode itself; the modes of
    its modules, such as LoRA's dropout, stay.

    Args:
        model: a causal language model, with or without an adapter.

    Returns:
        The number of layers.
    """
    modules = [*recurrent_modules(decoder_of(model))]
    for module in modules:
        module.register_forward_pre_hook(_leave_training)
    return len(modules)


def _leave_training(module: Any, _: Any) -> None:
    module.training = False
