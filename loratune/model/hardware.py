"""Detects the hardware: device, dtypes, threads."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass

import psutil
import torch
from transformers.utils import is_flash_attn_2_available

from loratune.errors import Exit, LoratuneError, counted
from loratune.model import nvidia
from loratune.model.nvidia import FLASH_CAPABILITY, are_gpus_hidden, compiled_for, has_kernels
from loratune.runtime import process_count


@dataclass(frozen=True)
class Hardware:
    """The device of this process, and the number of processes."""

    device: torch.device
    has_bfloat16: bool
    """Whether bfloat16 products run in hardware."""
    name: str
    processes: int = 1
    """As torchrun has started them, over all machines."""
    capability: tuple[int, int] = (0, 0)
    """CUDA compute capability of the GPU, such as (8, 9)."""
    others: int = 0
    """Further GPUs that this process does not use."""

    @property
    def is_distributed(self) -> bool:
        """Whether several processes train one model together."""
        return self.processes > 1

    @property
    def is_gpu(self) -> bool:
        return str(self.device.type) == "cuda"


def detect_hardware() -> Hardware:
    """Use the GPU of this process's local rank, or the CPU with one thread per physical core.

    OMP_NUM_THREADS decides the number of threads instead where a user has set it; torchrun sets it to 1 by itself.

    Raises:
        LoratuneError: torch cannot use the GPU of this machine.
    """
    processes = process_count()
    if torch.cuda.is_available():
        return _gpu(processes)
    _require_no_gpu()
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if "OMP_NUM_THREADS" not in os.environ or local_processes > 1:
        torch.set_num_threads(max(1, usable_cores() // local_processes))
    return cpu_hardware(processes)


def cpu_hardware(processes: int = 1) -> Hardware:
    """Return the CPU of this machine, with the threads that torch has now, whatever GPU is there."""
    threads = torch.get_num_threads()
    has_bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    name = f"CPU, {counted(threads, 'thread')}"
    return Hardware(torch.device("cpu"), has_bfloat16, name, processes)


def visible_gpus() -> int:
    """Return how many GPUs torch can use on this machine.

    Raises:
        LoratuneError: there is one that torch cannot use.
    """
    if not torch.cuda.is_available():
        _require_no_gpu()
    return int(torch.cuda.device_count())


def _gpu(processes: int) -> Hardware:
    count = torch.cuda.device_count()
    # A launcher may show each process a GPU of its own, all of which are number 0.
    local_rank = os.environ.get("LOCAL_RANK", "")
    device = torch.device("cuda", int(local_rank) % count if local_rank.isdecimal() else 0)
    capability = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    _require_kernels(name, capability)
    torch.cuda.set_device(device)
    # cuDNN makes a plan for every new length of a document, which takes about a second each.
    torch.backends.cuda.enable_cudnn_sdp(False)
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    others = count - 1 if processes == 1 else 0
    return Hardware(device, has_bfloat16, name, processes, capability, others)


def _require_kernels(name: str, capability: tuple[int, int]) -> None:
    """Refuse a card that this build of torch has no kernels for; the first computation on it would fail.

    Raises:
        LoratuneError: with the capabilities that torch was compiled for.
    """
    architectures = torch.cuda.get_arch_list()
    if has_kernels(capability, architectures):
        return
    names = ", ".join(f"{major}.{minor}" for _, (major, minor) in compiled_for(architectures))
    raise LoratuneError(
        f"{name} has compute capability {capability[0]}.{capability[1]}, and torch {torch.__version__} was compiled "
        f"for {names}. Install a build of torch for this card (https://pytorch.org/get-started/locally), or use the "
        "CPU with CUDA_VISIBLE_DEVICES=-1",
        Exit.IO,
    )


def _require_no_gpu() -> None:
    """Refuse to compute on the CPU without a word where a GPU is there.

    Raises:
        LoratuneError: there is an NVIDIA GPU that torch cannot use, and CUDA_VISIBLE_DEVICES does not exclude it.
    """
    if are_gpus_hidden() or not nvidia.DEVICE.exists():
        return
    driver = " ".join(nvidia.DRIVER.read_text().split("\n")[0].split()) if nvidia.DRIVER.exists() else "unknown"
    raise LoratuneError(
        f"this machine has an NVIDIA GPU that torch cannot use: {why_no_gpu()}\n"
        f"driver: {driver}; torch {torch.__version__}, made for CUDA {torch.version.cuda or 'none'}\n"
        "Install a newer driver, or a build of torch for this one (https://pytorch.org/get-started/locally); "
        "CUDA_VISIBLE_DEVICES=-1 uses the CPU",
        Exit.IO,
    )


def why_no_gpu() -> str:
    """Return torch's reason for not using the GPU of this machine, which is a warning or an exception."""
    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            torch.cuda.init()
        except Exception as error:
            return " ".join(str(error).split())
    return " ".join(str(seen[-1].message).split()) if seen else "no reason given"


def usable_cores() -> int:
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


def resolve_attention(name: str, hardware: Hardware, dtype: torch.dtype) -> str:
    """The transformers attention implementation of a recipe's attention setting.

    Args:
        name: the setting.
        hardware: that the model is on.
        dtype: that it computes in.

    Raises:
        LoratuneError: flash attention is asked for and cannot run.
    """
    missing = _what_flash_attention_lacks(hardware, dtype)
    if name == "flash_attention_2" and missing:
        raise LoratuneError(
            f"model.attn_implementation flash_attention_2 needs {' and '.join(missing)}; use auto or sdpa", Exit.USAGE
        )
    return ("sdpa" if missing else "flash_attention_2") if name == "auto" else name


def _what_flash_attention_lacks(hardware: Hardware, dtype: torch.dtype) -> list[str]:
    found = []
    if not hardware.is_gpu or hardware.capability < FLASH_CAPABILITY:
        found.append("a GPU of compute capability 8.0 or higher")
    if dtype not in (torch.bfloat16, torch.float16):
        found.append("model.dtype bfloat16 or float16")
    # Not by the name of its folder, which flash-attn-4 has too.
    if not is_flash_attn_2_available():
        found.append("the package flash-attn 2")
    return found
