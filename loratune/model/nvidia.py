"""What is known of NVIDIA's GPUs and drivers without torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

DEVICE = Path("/dev/nvidiactl")
"""Exists where a process is given an NVIDIA GPU; the driver's file is visible in every container of the machine."""
DRIVER = Path("/proc/driver/nvidia/version")
FLASH_CAPABILITY = (8, 0)
"""The lowest that flash attention has kernels for."""


def are_gpus_hidden() -> bool:
    """Return whether the user has excluded all GPUs."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")


def compiled_for(architectures: Sequence[str]) -> list[tuple[str, tuple[int, int]]]:
    """Return sm (code) or compute (PTX) and the compute capability of names such as sm_90 or sm_120a."""
    return [_architecture(name) for name in architectures if "_" in name]  # ROCm's have none


def has_kernels(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Return whether a build of torch runs on a GPU.

    Code of an architecture runs on later ones of the same generation, PTX on all later ones.

    Args:
        capability: compute capability of the GPU.
        architectures: what torch was compiled for, `torch.cuda.get_arch_list()`; if empty, this cannot be known.
    """
    compiled = compiled_for(architectures)
    fits = [at <= capability and (at[0] == capability[0] or kind == "compute") for kind, at in compiled]
    return not fits or any(fits)


def _architecture(name: str) -> tuple[str, tuple[int, int]]:
    kind, _, number = name.partition("_")
    major, minor = divmod(int(number.rstrip("af")), 10)
    return kind, (major, minor)
