"""What this machine is, the peaks of a process's memory, and a process that holds the card's memory."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DRIVER = Path("/proc/driver/nvidia/version")
SHARED_MEMORY = Path("/dev/shm")
ROOM = 40e9
"""Bytes of the models, runs and merged models that the checks write on a GPU machine."""
HOLD = """
import sys, torch
torch.zeros(1, device="cuda")
taken = torch.cuda.mem_get_info()[0] - int(sys.argv[1])
block = torch.empty(max(0, taken), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""
PEAK_FLOPS = {
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "H800": 989e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "A10": 125e12,
    "RTX 5090": 209e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
"""Dense bfloat16 products per second with float32 sums, as the maker states them; the first name that fits counts."""


def description() -> dict[str, Any]:
    """Return the card, or None, and the versions that results depend on."""
    import torch

    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"card": card, "torch": torch.__version__, "python": sys.version.split()[0]}


def roomy_folder() -> Path | None:
    """Return shared memory if the models fit there, which spares the disk; None for the usual temporary folder."""
    return SHARED_MEMORY if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free >= ROOM else None


def driver_version() -> str:
    return " ".join(DRIVER.read_text().splitlines()[0].split()) if DRIVER.is_file() else "none"


def nominal_flops() -> float | None:
    """Return what the card is said to reach in bfloat16; None for one that is not in the table."""
    import torch

    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def reset_peak() -> None:
    """Start anew to look for the highest use of memory: of the GPU, or resident without one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def memory_now() -> int:
    """Return the bytes in use: allocated on the GPU, or resident without one."""
    import torch

    return int(torch.cuda.memory_allocated()) if torch.cuda.is_available() else _status("VmRSS")


def memory_peak() -> int:
    """Return the highest `memory_now` since `reset_peak`."""
    import torch

    return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else _status("VmHWM")


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def only_free(left: float) -> Iterator[None]:
    """Let another process hold all of the card's memory but this many bytes."""
    command = [sys.executable, "-c", HOLD, str(int(left))]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        if holder.stdout is None or holder.stdout.readline().strip() != "held":
            raise RuntimeError("the card's memory could not be held")
        yield
    finally:
        holder.kill()
        holder.communicate()


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
