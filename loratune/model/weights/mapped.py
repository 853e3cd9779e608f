"""A model whose weights stay memory-mapped, so that it needs little memory at any size.

For model comparisons it computes in float32: in bfloat16, two correct computations of one model differ by more than the
rounding of merged weights.
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
"""Number of matrix values that are converted to float32 at a time."""
RESIDENT_BYTES = 2_000_000_000
"""Pages of smaller models stay mapped after reading; those of larger ones are released after each use."""


def load_mapped(folder: Path, in_float32: bool = True) -> CausalModel:
    """A causal language model as transformers loads it, then bound to its mapped files.

    Args:
        folder: model folder.
        in_float32: compute in float32 for comparison; otherwise in the files' dtype.

    Raises:
        LoratuneError: transformers cannot load it, or weights and config do not match.
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
    # generate passes a strided slice to the head, and torch 2.13's bfloat16 product of it is a hundred times slower.
    outputs = functional.linear(inputs.contiguous(), module.weight, module.bias)
    release()
    return outputs


def _linear_in_float32(module: nn.Linear, release: Callable[[], None], inputs: torch.Tensor) -> torch.Tensor:
    """Compute inputs (..., in) @ weight.T + bias, converting some rows of the weight at a time."""
    inputs = inputs.float()
    outputs = inputs.new_empty(*inputs.shape[:-1], module.out_features)
    step = max(1, PIECE_VALUES // module.in_features)
    for start in range(0, module.out_features, step):
        rows = slice(start, start + step)
        weight = module.weight[rows]
        # One buffer for all pieces: separate allocations fragment the heap and double the memory.
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
    tokens, places = ids.unique(return_inverse=True)
    return embedded(module, module.weight[tokens].float(), places)


def embedded(module: nn.Embedding, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Compute an embedding's own forward pass, which may scale the rows, with other rows than its own.

    Args:
        module: the embedding.
        rows: (tokens, width).
        places: row of each position.
    """
    held, padding = module._parameters["weight"], module.padding_idx
    # The padding's row has no gradient, which is all that it means; it may be beyond these rows.
    module._parameters["weight"], module.padding_idx = rows, None
    try:
        output: torch.Tensor = type(module).forward(module, places)
    finally:
        module._parameters["weight"], module.padding_idx = held, padding
    return output
