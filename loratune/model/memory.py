"""Memory of this machine: peak use, free memory, and glibc's allocator settings."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from loratune.model.hardware import Hardware

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from malloc.h
CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Memory limits of Linux containers and jobs: (limit, usage, statistics) for cgroup versions 2 and 1.
GROUP_FILES = [
    ("memory.max", "memory.current", "memory.stat"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
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
    """Make glibc keep large freed blocks, but for those of over 32 MiB, which logits take.

    What is returned to the system comes back zeroed page by page, which makes training steps on a CPU up to a quarter
    slower. Blocks that are kept are not reused without gaps. Has no effect with another allocator.
    """
    _set_malloc(M_MMAP_THRESHOLD, 32 << 20)  # the most that mallopt documents
    _set_malloc(M_TRIM_THRESHOLD, -1)


def hold_within(model: nn.Module, most: int) -> None:
    """Return freed blocks to the system before each pass of a model that finds them to be too many.

    Blocks that are kept are not reused without gaps, so a process grows for as long as its passes have new sizes.

    Args:
        model: that the passes call.
        most: resident bytes of the process between two passes.
    """

    def look(*_: Any) -> None:
        if resident_bytes() > most:
            return_freed_memory()
            if resident_bytes() > most:  # it holds more than was expected, so this saves nothing
                looking.remove()

    looking = model.register_forward_pre_hook(look)


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def return_large_blocks() -> None:
    """Make glibc return blocks of 64 KiB and more to the system as soon as they are freed.

    Memory in use is what tensors take then. Otherwise, what is made again and again, such as weights that are gathered
    or converted, comes to lie between what stays, with gaps. Has no effect with another allocator.
    """
    _set_malloc(M_MMAP_THRESHOLD, 1 << 16)


def _set_malloc(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(option, value)


def release_file_pages(paths: Iterable[Path]) -> None:
    """Give up the pages of memory-mapped files that this process has read.

    The system keeps them as long as it has room. They count as resident memory of the process otherwise, also where
    the weights that were made of them have other values. A mapping that was written to keeps its pages.
    """
    if sys.platform != "linux":
        return
    wanted = {os.path.realpath(path) for path in paths}
    with contextlib.suppress(OSError, AttributeError):
        for mapping in psutil.Process().memory_maps(grouped=False):
            if mapping.path in wanted and not mapping.anonymous:
                start, end = (int(address, 16) for address in mapping.addr.split("-"))
                ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


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
    free = int(min([psutil.virtual_memory().available, *map(_free_in_group, _own_groups(CGROUPS, OWN_CGROUPS))]))
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _own_groups(root: Path, listing: Path) -> Iterator[Path]:
    """Yield the folders of the cgroups that this process is in, and of those around them.

    A container usually sees its own cgroup as the root; a job of Slurm or systemd sees the path to it.

    Args:
        root: where cgroups are mounted.
        listing: the process's cgroups, a line of `number:controllers:path` for each hierarchy.
    """
    try:
        lines = [line.split(":", 2) for line in listing.read_text().splitlines() if line.count(":") >= 2]
    except OSError:
        lines = []
    paths = {controllers: path for _, controllers, path in lines}  # version 2 has no controllers
    by_memory = next((path for names, path in paths.items() if "memory" in names.split(",")), "/")
    for top, path in [(root, paths.get("", "/")), (root / "memory", by_memory)]:
        own = top / path.strip("/")
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(top))


def _free_in_group(folder: Path) -> int:
    """Return the free bytes of a cgroup, or a huge number if it has no limit."""
    for limit, used, statistics in GROUP_FILES:
        try:
            bound = (folder / limit).read_text().strip()
            taken = int((folder / used).read_text())
            lines = [line.split() for line in (folder / statistics).read_text().splitlines()]
        except (OSError, ValueError):
            continue
        if bound.isdecimal():  # no limit: "max" in version 2, a huge number in version 1
            cached = max((int(value) for name, value in lines if name in RECLAIMABLE), default=0)
            return max(0, int(bound) - taken + cached)
    return sys.maxsize


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
