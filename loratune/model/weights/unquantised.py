"""Lets a quantised model compute with the plain weights of its files, one matrix in memory at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from loratune.model.architecture.file_layout import file_layout
from loratune.model.files import weight_files
from loratune.model.weights.held import is_quantised
from loratune.model.weights.stack import stacks_of
from loratune.model.weights.tensor_files import TensorFiles
from loratune.protocols import CausalModel


@contextmanager
def unquantised(model: CausalModel, folder: Path, advance: Callable[[int, int], None]) -> Iterator[None]:
    """Replace quantised weights by those of the files.

    Args:
        model: a quantised model without an adapter.
        folder: the model's folder.
        advance: called before a matrix is read, with its bytes and with those of all quantised weights.
    """
    files = TensorFiles(weight_files(folder))
    layout = file_layout(model, files.infos)
    infos = layout.infos(files.infos)
    quantised = {name for name, parameter in model.named_parameters() if is_quantised(parameter)}
    total = sum(infos[name].nbytes for name in quantised)

    last: list[str] = []

    def read(name: str, number: int | None) -> torch.Tensor:
        files.release(last)
        last[:] = layout.tensors_of(name)
        matrices = 1 if number is None else infos[name].shape[0]
        advance(infos[name].nbytes // matrices, total)
        return layout.read(name, files) if number is None else layout.matrix(name, number, files)

    changed: list[Any] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{path}.weight" in quantised:
            module.forward = functools.partial(_linear, module, functools.partial(read, f"{path}.weight", None))
            changed.append(module)
        stacks: dict[str, Any] = dict(stacks_of(module))
        for attribute, stack in stacks.items():
            stack.original = functools.partial(read, f"{path}.{attribute}")
            changed.append(stack)
    try:
        yield
    finally:
        for one in changed:
            del vars(one)["forward" if isinstance(one, nn.Module) else "original"]


def _linear(module: Any, read: Callable[[], torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    bias = None if module.bias is None else module.bias.to(inputs.dtype)
    return functional.linear(inputs, read().to(inputs.device, inputs.dtype), bias)
