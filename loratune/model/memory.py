"""The memory of this machine: what a process has held, what is free, how glibc treats it."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

import psutil
import torch

from loratune.model.hardware import Hardware

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as malloc.h has them
# Where Linux bounds the memory of a container: (limit, in use, statistics), in version 2 and 1 of control groups.
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
    """Tell glibc to keep large blocks that are freed.

    By default each goes back to the system and comes anew, zeroed page by page, which takes time in every training step
    on a CPU. Does nothing where the allocator is another one.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(M_MMAP_THRESHOLD, 1 << 30)
    mallopt(M_TRIM_THRESHOLD, -1)


def free_memory_bytes(hardware: Hardware) -> int:
    """What a process can still take: of the GPU, or its share of main memory within the container's bound."""
    if hardware.is_gpu:
        free, _ = torch.cuda.mem_get_info()
        return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
    return free_main_memory_bytes()


def free_main_memory_bytes() -> int:
    """This process's share of main memory that is free, within the container's bound."""
    free = int(min([psutil.virtual_memory().available, *_free_in_group(Path("/sys/fs/cgroup"))]))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _free_in_group(root: Path) -> list[int]:
    """Free bytes of the control group, for each version of such groups that bounds them."""
    free = []
    for limit, used, statistics in GROUPS:
        try:
            bound = (root / limit).read_text().strip()
            taken = int((root / used).read_text())
            lines = [line.split() for line in (root / statistics).read_text().splitlines()]
        except (OSError, ValueError):
            continue
        if bound.isdecimal():  # version 2 writes "max" for none, version 1 a number beyond any machine
            cached = max((int(value) for name, value in lines if name in RECLAIMABLE), default=0)
            free.append(max(0, int(bound) - taken + cached))
    return free


def peak_memory_bytes(hardware: Hardware) -> int:
    """Most memory this process has held: on the GPU, or resident on the CPU."""
    if hardware.is_gpu:
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out; allocators and cuBLAS raise plain RuntimeErrors."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)
