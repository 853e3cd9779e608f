"""Validates the values of an adapter's tensors; needs no base."""

from __future__ import annotations

import math
import shlex
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loratune.errors import Exit, LoratuneError, counted
from loratune.model.adapter.files import WEIGHTS_FILE, read_config_values

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PAIRS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}
"""Name suffix of the matrix applied first → that of the other."""
PICKLED_FILE = "adapter_model.bin"
CONVERSION = (
    "import sys, torch, safetensors.torch as st; pickled, path = sys.argv[1:]; "
    "tensors = torch.load(pickled, map_location='cpu', weights_only=True); "
    "whole = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}; "
    "st.save_file(whole, path, {'format': 'pt'})"
)
"""Program that writes pickled weights as safetensors. Its arguments are both paths; no code in the file is run."""
HIGHEST = torch.finfo(torch.float32).max
"""Maximum of float32, in which loratune computes updates; bfloat16 has the same range."""
TOO_LARGE = "makes updates larger than float32 can hold"


def weights_file(folder: Path) -> Path:
    """Return the path of an adapter's weights.

    Raises:
        LoratuneError: there are none, or only pickled ones; the message has the command that converts these.
    """
    path, pickled = folder / WEIGHTS_FILE, folder / PICKLED_FILE
    if path.is_file():  # opening a pipe would block
        return path
    told = f"{folder}: no {WEIGHTS_FILE} in it"
    if pickled.is_file():
        command = shlex.join(["python", "-c", CONVERSION, str(pickled), str(path)])
        told += f", only pickled weights, which are never opened. PyTorch converts them:\n  {command}"
    raise LoratuneError(told, Exit.MODEL)


def check_weights(folder: Path) -> None:
    """Validate an adapter's tensors; every command does so before using them.

    Raises:
        LoratuneError: the file is missing or damaged; or tensors have another dtype than floating point, contain NaN or
            infinity, or give an update that exceeds float32.
    """
    path = weights_file(folder)
    values, found = read_config_values(folder), defaultdict[str, list[str]](list)
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if problem := _problem(name, file, values):
                    found[problem].append(name)
    except (SafetensorError, OSError) as error:
        raise LoratuneError(f"{path}: damaged: {error}", Exit.MODEL) from error
    if found:
        lines = [f"{problem} in {counted(len(names), 'tensor')}, first {names[0]}" for problem, names in found.items()]
        raise LoratuneError(f"{path}: {'; '.join(lines)}", Exit.MODEL)


def _problem(name: str, file: Any, values: dict[str, Any]) -> str | None:
    tensor = file.get_tensor(name)
    if tensor.dtype not in DTYPES:
        return f"contains values of an unsupported dtype ({str(tensor.dtype).removeprefix('torch.')})"
    if not tensor.isfinite().all():
        return "holds NaN or infinity"
    if tensor.numel() and float(tensor.abs().max()) > HIGHEST:
        return TOO_LARGE
    first = next((ending for ending in PAIRS if name.endswith(ending)), None)
    other = f"{name.removesuffix(first)}{PAIRS[first]}" if first else ""
    if first and other in file.keys() and not _largest_update(tensor, file.get_tensor(other), values) <= HIGHEST:  # noqa: SIM118
        return TOO_LARGE
    return None


def _largest_update(first: torch.Tensor, second: torch.Tensor, values: dict[str, Any]) -> float:
    """Return an upper bound of the values of s·B·A without the product, which takes as long as a merge."""
    if first.ndim != 2 or second.ndim != 2 or first.shape[0] != second.shape[1]:
        return 0.0  # reported by the checks of shapes
    if not first.numel() or not second.numel():
        return 0.0
    rank = first.shape[0]
    alpha = max([values["lora_alpha"], *(number or 0 for number in (values.get("alpha_pattern") or {}).values())])
    scale = scaling(alpha, rank, values)
    of_ranks = first.abs().amax(1).double() * second.abs().amax(0).double()
    return float(of_ranks.sum() * scale)


def scaling(alpha: float, rank: int, values: dict[str, Any]) -> float:
    """Return a LoRA layer's scale: alpha / rank, or alpha / √rank (rsLoRA, Kalajdzievski 2023).

    Args:
        alpha: alpha of the layer.
        rank: rank of the layer.
        values: values of adapter_config.json.
    """
    return alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)
