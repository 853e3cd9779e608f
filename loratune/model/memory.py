"""Memory of this machine: peak use, free memory, and glibc's allocator settings."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from pathlib import Path

import psutil
import torch

from loratune.model.hardware import Hardware

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h
# Memory limits of Linux containers: (limit, usage, statistics) for cgroup versions 2 and 1.
GROUPS = [
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
]
OUT_OF_MEMORY = (
    "DefaultCPUAllocator",
    "Cannot allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)
"""In messages of errors without a class of their own: the CPU allocator's, mmap's, cuBLAS' and the driver's."""
RECLAIMABLE = ("inactive_file", "total_inactive_file")


def keep_freed_memory() -> None:
    """Make glibc keep large freed blocks.

    By default it returns them to the system and gets them back zeroed page by page, which slows down every training
    step on a CPU. Has no effect with another allocator.
    """
    _set_malloc(M_MMAP_THRESHOLD, 1 << 30)
    _set_malloc(M_TRIM_THRESHOLD, -1)


def return_large_blocks() -> None:
    """Make glibc return blocks of 64 KiB and more to the system as soon as they are freed.

    Weights that are gathered again and again would lie between what stays otherwise, until the gaps are as large as the
    whole base. Has no effect with another allocator.
    """
    _set_malloc(M_MMAP_THRESHOLD, 1 << 16)


def _set_malloc(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(option, value)


def return_freed_memory() -> None:
    """Make glibc return freed blocks to the system, also those between blocks in use.

    Has no effect with another allocator.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def free_memory_bytes(hardware: Hardware) -> int:
    """Return the available memory: of the GPU, or this process's share of main memory within the container's limit."""
    if hardware.is_gpu:
        free, _ = torch.cuda.mem_get_info()
        return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
    return free_main_memory_bytes()


def free_main_memory_bytes() -> int:
    """This process's share of main memory that is free, within the container's bound."""
    free = int(min([psutil.virtual_memory().available, *_free_in_group(Path("/sys/fs/cgroup"))]))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _free_in_group(root: Path) -> list[int]:
    """Return the free bytes for each cgroup version with a limit."""
    free = []
    for limit, used, statistics in GROUPS:
        try:
            bound = (root / limit).read_text().strip()
            taken = int((root / used).read_text())
            lines = [line.split() for line in (root / statistics).read_text().splitlines()]
        except (OSError, ValueError):
            continue
        if bound.isdecimal():  # no limit: "max" in version 2, a huge number in version 1
            cached = max((int(value) for name, value in lines if name in RECLAIMABLE), default=0)
            free.append(max(0, int(bound) - taken + cached))
    return free


def peak_memory_bytes(hardware: Hardware) -> int:
    """Return the peak memory of this process: allocated on the GPU, or resident on the CPU."""
    if hardware.is_gpu:
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out; allocators and cuBLAS raise plain RuntimeErrors."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)
