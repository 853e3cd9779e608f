"""Whether the values of an adapter's tensors are such that a model can be computed with them; needs no base."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from loratune.errors import Exit, LoratuneError
from loratune.model.adapter.files import WEIGHTS_FILE, read_config_values

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PAIRS = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}
"""End of the name of the matrix that is multiplied first → that of the other."""
HIGHEST = torch.finfo(torch.float32).max
"""In which loratune computes updates; bfloat16 reaches as far."""
TOO_LARGE = "makes updates larger than float32 can hold"


def check_weights(folder: Path) -> None:
    """Judge an adapter's tensors, as every command does before it reads them.

    Raises:
        LoratuneError: the file is missing or damaged; tensors are no floating-point numbers, hold NaN or infinity, or
            make an update that float32 cannot hold.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():  # a pipe would be waited for
        pickled = " (only pickled weights, which are never opened)" if (folder / "adapter_model.bin").exists() else ""
        raise LoratuneError(f"{folder}: no {WEIGHTS_FILE} in it{pickled}", Exit.MODEL)
    values, found = read_config_values(folder), defaultdict[str, list[str]](list)
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if problem := _problem(name, file, values):
                    found[problem].append(name)
    except (SafetensorError, OSError) as error:
        raise LoratuneError(f"{path}: damaged, so that it cannot be read: {error}", Exit.MODEL) from error
    if found:
        told = [f"{problem} in {len(names)} tensors, first {names[0]}" for problem, names in found.items()]
        raise LoratuneError(f"{path}: {'; '.join(told)}", Exit.MODEL)


def _problem(name: str, file: Any, values: dict[str, Any]) -> str | None:
    tensor = file.get_tensor(name)
    if tensor.dtype not in DTYPES:
        return f"holds values of a type that is not read ({str(tensor.dtype).removeprefix('torch.')})"
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
    """A bound of the values of s·B·A, without the product: that takes as long as a merge."""
    if first.ndim != 2 or second.ndim != 2 or first.shape[0] != second.shape[1]:
        return 0.0  # which is told by those who look at shapes
    if not first.numel() or not second.numel():
        return 0.0
    rank = first.shape[0]
    alpha = max([values["lora_alpha"], *(number or 0 for number in (values.get("alpha_pattern") or {}).values())])
    scale = scaling(alpha, rank, values)
    of_ranks = first.abs().amax(1).double() * second.abs().amax(0).double()
    return float(of_ranks.sum() * scale)


def scaling(alpha: float, rank: int, values: dict[str, Any]) -> float:
    """What a LoRA layer multiplies its update by: alpha over the rank, or over its root (rsLoRA, Kalajdzievski 2023).

    Args:
        alpha: of the layer.
        rank: of the layer.
        values: of adapter_config.json.
    """
    return alpha / (math.sqrt(rank) if values.get("use_rslora") else rank)
