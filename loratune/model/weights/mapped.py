"""A model whose weights stay in their files, so that it takes little memory, whatever its size.

It computes in float32, for comparing models: in bfloat16 two right ways of computing the same model differ by more than
the rounding of merged weights does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from loratune.model.architecture.file_layout import file_layout
from loratune.model.files import weight_files
from loratune.model.from_folder import load_plain
from loratune.model.weights.tensor_files import TensorFiles
from loratune.protocols import CausalModel

PIECE_VALUES = 4_000_000
"""Values of a matrix that are float32 at once."""
RESIDENT_BYTES = 2_000_000_000
"""Pages of a smaller model stay mapped once read; those of a larger one are let go again after each use."""


def load_mapped(folder: Path, in_float32: bool = True) -> CausalModel:
    """A causal language model as transformers loads it, then bound to its mapped files.

    Args:
        folder: model folder.
        in_float32: compute in float32, as for a comparison; else in the type of the files, as any program does.

    Raises:
        LoratuneError: transformers cannot load it, or the weights do not fit the config.
    """
    model = load_plain(folder)
    files = TensorFiles(weight_files(folder))
    layout = file_layout(model, files.infos)
    is_large = sum(info.nbytes for info in files.infos.values()) > RESIDENT_BYTES
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, name in names.items():
        values = layout.read(name, files)
        if values.ndim < 2 and in_float32:  # norms and biases: small
            values = values.to(torch.float32, copy=True)
        parameter.data = values
    for module in model.modules():
        if isinstance(module, nn.Linear):
            held = layout.tensors_of(names[module.weight])
            release = functools.partial(files.release, held if is_large else [])
            module.forward = functools.partial(_linear_in_float32 if in_float32 else _linear, module, release)
        elif isinstance(module, nn.Embedding) and in_float32:
            module.forward = functools.partial(_embedding_in_float32, module)
    return model


def _linear(module: nn.Linear, release: Callable[[], None], inputs: torch.Tensor) -> torch.Tensor:
    # generate hands the head a slice with gaps, on which torch 2.13's bfloat16 product takes a hundred times as long.
    outputs = functional.linear(inputs.contiguous(), module.weight, module.bias)
    release()
    return outputs


def _linear_in_float32(module: nn.Linear, release: Callable[[], None], inputs: torch.Tensor) -> torch.Tensor:
    """inputs (..., in) @ weight.T + bias, some rows of the weight at a time."""
    inputs = inputs.float()
    outputs = inputs.new_empty(*inputs.shape[:-1], module.out_features)
    step = max(1, PIECE_VALUES // module.in_features)
    for start in range(0, module.out_features, step):
        rows = slice(start, start + step)
        weight = module.weight[rows]
        # One buffer for all: allocating each piece anew fragments the heap, to twice the memory in all.
        exact = _buffer(max(PIECE_VALUES, module.in_features))[: weight.numel()].view(weight.shape).copy_(weight)
        outputs[..., rows] = functional.linear(
            inputs, exact, None if module.bias is None else module.bias[rows].float()
        )
        release()
    return outputs


@functools.lru_cache(maxsize=1)
def _buffer(values: int) -> torch.Tensor:
    return torch.empty(values)


def _embedding_in_float32(module: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    return functional.embedding(ids, module.weight).float()
