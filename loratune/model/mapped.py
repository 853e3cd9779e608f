"""A model whose weights stay in their files: it computes in float32 and takes little memory, whatever its size.

For comparing models, where exact arithmetic counts and speed does not: in bfloat16 two right ways of computing the same
model differ by more than the rounding of merged weights does.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from loratune.errors import Exit, LoratuneError
from loratune.model.files import weight_files
from loratune.model.tensor_files import TensorFiles

PIECE_VALUES = 4_000_000
"""Values of a matrix that are float32 at once."""


def load_mapped(folder: Path, files: TensorFiles | None = None) -> Any:
    """A causal language model as transformers loads it, then bound to its mapped files.

    Args:
        folder: model folder.
        files: where the values come from, if not from the folder's own files.

    Raises:
        LoratuneError: transformers cannot load it, or the weights do not fit the config.
    """
    model = load_plain(folder)
    files = files or TensorFiles(weight_files(folder))
    names = {parameter: name for name, parameter in model.named_parameters()}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = files.tensor(names[parameter])
        if isinstance(module, nn.Linear):
            module.forward = functools.partial(
                _linear, module, functools.partial(files.release, [names[module.weight]])
            )
        elif isinstance(module, nn.Embedding):
            module.forward = functools.partial(_embedding, module)
        else:
            for parameter in module.parameters(recurse=False):  # norms: small
                parameter.data = parameter.data.float()
    return model.eval()


def load_plain(folder: Path) -> Any:
    """A causal language model as anybody would load it with transformers, in the type of its files, on the CPU.

    Raises:
        LoratuneError: it cannot be loaded, or tensors are missing or left over.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise LoratuneError(
            f"{folder}: transformers cannot load it: {str(error).splitlines()[0]}", Exit.MODEL
        ) from error
    strange = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    if strange:
        raise LoratuneError(f"{folder}: weights and config do not fit: {', '.join(strange[:5])}", Exit.MODEL)
    return model.requires_grad_(False).eval()


def _linear(module: nn.Linear, release: Any, inputs: torch.Tensor) -> torch.Tensor:
    """inputs (..., in) @ weight.T + bias in float32, some rows of the weight at a time."""
    inputs = inputs.float()
    step = max(1, PIECE_VALUES // module.in_features)
    pieces = []
    for start in range(0, module.out_features, step):
        rows = slice(start, start + step)
        bias = None if module.bias is None else module.bias[rows].float()
        pieces.append(functional.linear(inputs, module.weight[rows].float(), bias))
        release()
    return torch.cat(pieces, dim=-1) if len(pieces) > 1 else pieces[0]


def _embedding(module: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    return functional.embedding(ids, module.weight).float()
