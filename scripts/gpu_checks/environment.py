"""Says what the machine is, and which attention kernel torch takes for a packed document."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from gpu_checks import machine
from gpu_checks.table import Figures, Workplace

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "bitsandbytes",
    "liger-kernel",
    "unsloth",
    "flash-attn",
    "flash-linear-attention",
    "causal-conv1d",
    "mamba-ssm",
)
BACK_ENDS = {0: "math", 1: "flash", 2: "memory-efficient", 3: "cuDNN"}


def environment(place: Workplace) -> Figures:
    """Return versions, the card and its driver, and torch's choice for grouped causal bfloat16 queries."""
    from loratune.model.hardware import detect_hardware

    hardware = detect_hardware()  # it switches off what has to be
    choice = back_end(hardware.device)
    figures: dict[str, Any] = {
        "hardware": hardware.name, "driver": machine.driver_version(), "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(), "architectures": torch.cuda.get_arch_list(),
        "capability": list(hardware.capability), "attention back end": choice,
        "attention": BACK_ENDS.get(choice, "unknown"), "versions": {name: version_of(name) for name in PACKAGES},
        "bitsandbytes": bitsandbytes_back_end(),
    }  # fmt: skip
    if place.is_gpu:
        free, total = torch.cuda.mem_get_info()
        figures |= {"free GB": free / 1e9, "total GB": total / 1e9}
    return figures


def back_end(device: Any) -> int:
    """Return torch's number of the kernel for 28 query heads on 4 key heads, 300 tokens, causal."""
    query = torch.zeros(1, 28, 300, 128, device=device, dtype=torch.bfloat16)
    key = torch.zeros(1, 4, 300, 128, device=device, dtype=torch.bfloat16)
    return int(torch._fused_sdp_choice(query, key, key, None, 0.0, True, scale=None, enable_gqa=True))


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def bitsandbytes_back_end() -> str:
    """Return the library that bitsandbytes has loaded."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "not installed"
    from bitsandbytes import cextension

    return str(getattr(cextension.lib, "_lib", cextension.lib))
