"""A model whose weights stay memory-mapped, so that it needs little memory at any size.

For model comparisons it computes in float32: in bfloat16, two correct computations of one model differ by more than the
rounding of merged weights. Matrices are converted as they are used, some rows or one matrix of a stack at a time. On a
GPU these pieces are copied there as they are used, so the model need not fit into its memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from loratune.model.architecture.file_layout import FileLayout, file_layout
from loratune.model.architecture.roles import expert_stacks
from loratune.model.architecture.structure import causal_model
from loratune.model.files import weight_files
from loratune.model.from_folder import load_empty, load_plain
from loratune.model.weights.held import is_quantised
from loratune.model.weights.stack import Stack, use_stacks
from loratune.model.weights.tensor_files import TensorFiles
from loratune.protocols import CausalModel

PIECE_VALUES = 4_000_000
"""Number of matrix values that are converted to float32 at a time."""
CPU = torch.device("cpu")
RESIDENT_BYTES = 2_000_000_000
"""Pages of smaller models stay mapped after reading; those of larger ones are released after each use."""


def load_mapped(folder: Path, in_float32: bool = True, device: torch.device = CPU) -> CausalModel:
    """A causal language model that is bound to its mapped files.

    Only in float32 are its matrices mapped on a GPU too; otherwise its memory there holds the model.

    Args:
        folder: model folder.
        in_float32: compute in float32 for comparison. Otherwise it is loaded by transformers and computes in the files'
            dtype, except for a large mixture, whose stacks transformers would have in memory.
        device: that it computes on; see `device_of`.

    Raises:
        LoratuneError: transformers cannot load it, or weights and config do not match.
    """
    files = TensorFiles(weight_files(folder))
    if in_float32 or (_is_large(files) and bool(expert_stacks(load_empty(folder)))):
        return mapped_in_float32(load_empty(folder), files, device)
    model: Any = load_plain(folder)  # mypy knows no attributes of its own
    layout = file_layout(model, files.infos)
    _bind(model, layout, files)
    model.to(device)
    return _computing(model, _linear, layout, files, device)


def mapped_in_float32(model: CausalModel, files: TensorFiles, device: torch.device = CPU) -> CausalModel:
    """Return a model that computes in float32 with its mapped files, except for its quantised weights, which stay.

    Args:
        model: a causal language model, with or without values, that reads stacks one matrix at a time; it is changed.
        files: of its folder.
        device: that it computes on; see `device_of`. Quantised weights are on it already.
    """
    layout = file_layout(model, files.infos)
    _bind_in_float32(model, layout, files, device)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.forward = functools.partial(_embedding_in_float32, module)
    return _computing(model, _linear_in_float32, layout, files, device)


def _computing(
    model: Any, product: Callable[..., torch.Tensor], layout: FileLayout, files: TensorFiles, device: torch.device
) -> CausalModel:
    """Return a model whose linear layers compute with a function that takes the layer, and what to call afterwards."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    is_large = _is_large(files)
    for module in model.modules():
        if _is_linear(module):
            held = layout.tensors_of(names[module.weight])
            module.forward = functools.partial(
                product, module, functools.partial(files.release, held if is_large else [])
            )
    model.computes_on = device
    computing: CausalModel = model
    return computing


def _is_large(files: TensorFiles) -> bool:
    return sum(info.nbytes for info in files.infos.values()) > RESIDENT_BYTES


def device_of(model: CausalModel) -> torch.device:
    """Return the device that a model computes on, which those of a mapped model's parameters do not tell."""
    device: torch.device = getattr(causal_model(model), "computes_on", model.device)
    return device


def _is_linear(module: nn.Module) -> bool:
    return type(module).forward is nn.Linear.forward


def _bind(model: CausalModel, layout: FileLayout, files: TensorFiles) -> None:
    for name, parameter in model.named_parameters():
        if len(layout.parts[name]) == 1:  # transformers has put the others together in memory
            parameter.data = layout.read(name, files)


def _bind_in_float32(model: CausalModel, layout: FileLayout, files: TensorFiles, device: torch.device) -> None:
    """Give a model the values of its files: large matrices mapped, others as float32 copies on a device."""
    stacked, bound, is_large = expert_stacks(model), dict[int, nn.Parameter](), _is_large(files)
    for path, module in model.named_modules():
        stacks = {}
        for attribute, empty in module._parameters.items():
            name = f"{path}.{attribute}"
            if empty is None or id(empty) in bound or name not in layout.parts or is_quantised(empty):
                continue
            if name in stacked:
                read = functools.partial(_matrix, layout, name, files, is_large, device)
                stacks[attribute] = Stack(read, empty.shape, device)
                values = torch.zeros((), device=device).expand(empty.shape)  # PEFT looks at shape and dtype
            else:
                values = layout.read(name, files)
                if not (values.ndim == 2 and (_is_linear(module) or isinstance(module, nn.Embedding))):
                    values = values.to(device, torch.float32, copy=True)
            bound[id(empty)] = nn.Parameter(values, requires_grad=False)
        if stacks:
            use_stacks(module, stacks)
    for module in model.modules():
        for attribute, empty in module._parameters.items():
            module._parameters[attribute] = bound.get(id(empty), empty)
    _bind_buffers(model, layout, files, device)


def _bind_buffers(model: CausalModel, layout: FileLayout, files: TensorFiles, device: torch.device) -> None:
    """Read the buffers that are in the files, as float32, and move those that transformers computes from the config."""
    for path, module in model.named_modules():
        for attribute, buffer in module._buffers.items():
            if attribute not in module._non_persistent_buffers_set:
                values = layout.read(f"{path}.{attribute}", files)
                module._buffers[attribute] = values.to(device, torch.float32, copy=True)
            elif buffer is not None:
                module._buffers[attribute] = buffer.to(device)


def _matrix(
    layout: FileLayout, name: str, files: TensorFiles, is_large: bool, device: torch.device, number: int
) -> torch.Tensor:
    matrix = layout.matrix(name, number, files).to(device)
    if not is_large:
        return matrix
    matrix = matrix.to(torch.float32, copy=True)
    files.release(layout.tensors_of(name))
    return matrix


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
        weight = module.weight[rows].to(inputs.device)  # in the files' dtype, which is less to copy
        # One buffer for all pieces: separate allocations fragment the heap and double the memory.
        buffer = _buffer(max(PIECE_VALUES, module.in_features), inputs.device)
        exact = buffer[: weight.numel()].view(weight.shape).copy_(weight)
        outputs[..., rows] = functional.linear(
            inputs, exact, None if module.bias is None else module.bias[rows].float()
        )
        release()
    return outputs


@functools.lru_cache(maxsize=1)
def _buffer(values: int, device: torch.device) -> torch.Tensor:
    return torch.empty(values, device=device)


def _embedding_in_float32(module: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    tokens, places = ids.unique(return_inverse=True)
    # A mapped matrix takes no row numbers from a GPU.
    return embedded(module, module.weight[tokens.cpu()].to(ids.device).float(), places)


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
