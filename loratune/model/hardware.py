"""Detects the hardware: device, dtypes, threads."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import psutil
import torch

from loratune.errors import Exit, LoratuneError


@dataclass(frozen=True)
class Hardware:
    """The device of this process, and the number of processes."""

    device: torch.device
    has_bfloat16: bool
    """Whether bfloat16 products run in hardware."""
    name: str
    processes: int = 1
    """Number of processes started by torchrun, over all machines."""

    @property
    def is_distributed(self) -> bool:
        """Whether several processes train one model together."""
        return self.processes > 1

    @property
    def is_gpu(self) -> bool:
        return str(self.device.type) == "cuda"


def detect_hardware() -> Hardware:
    """Use the GPU of this process's local rank, or the CPU with one thread per physical core.

    A user's OMP_NUM_THREADS overrides the number of threads; torchrun sets it to 1, which is ignored.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Hardware(device, has_bfloat16, torch.cuda.get_device_name(), processes)
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if "OMP_NUM_THREADS" not in os.environ or local_processes > 1:
        torch.set_num_threads(max(1, _usable_cores() // local_processes))
    threads = torch.get_num_threads()
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    name = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    return Hardware(torch.device("cpu"), has_bfloat16, name, processes)


def _usable_cores() -> int:
    """Return the number of physical cores, limited by the process's CPU affinity."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(psutil.cpu_count(logical=False) or bound, bound)


def resolve_dtype(name: str, hardware: Hardware) -> torch.dtype:
    """Return the torch dtype of a recipe's setting.

    Raises:
        LoratuneError: float16 on a CPU, where it is emulated and overflows in training.
    """
    if name == "auto":
        if hardware.has_bfloat16:
            return torch.bfloat16
        return torch.float16 if hardware.is_gpu else torch.float32
    if name == "float16" and not hardware.is_gpu:
        raise LoratuneError("float16 needs a GPU; on a CPU use bfloat16, float32 or auto", Exit.USAGE)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def resolve_attention(name: str, hardware: Hardware) -> str:
    """Return transformers' attention implementation for a recipe's setting.

    Raises:
        LoratuneError: flash attention is requested but not available.
    """
    has_flash = hardware.is_gpu and importlib.util.find_spec("flash_attn") is not None
    if name == "flash_attention_2" and not has_flash:
        raise LoratuneError(
            "model.attn_implementation flash_attention_2 needs a GPU and the package flash-attn; use auto or sdpa",
            Exit.USAGE,
        )
    return ("flash_attention_2" if has_flash else "sdpa") if name == "auto" else name
