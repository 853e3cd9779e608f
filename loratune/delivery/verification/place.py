"""Runs a proof on the GPU where there is one, and on the CPU where it fails there: the CPU's verdict counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from loratune import console
from loratune.errors import LoratuneError, named_reason_of
from loratune.model.files import weight_files
from loratune.model.hardware import Hardware, cpu_hardware, detect_hardware
from loratune.model.memory import free_memory_bytes, is_out_of_memory
from loratune.model.weights.mapped import CPU

Result = TypeVar("Result")
SPARE = 1.3
"""Memory for answers with a model in its files' dtype, as a multiple of the files."""


def run_proof(work: Callable[[Hardware], Result]) -> tuple[Result, str]:
    """Run a comparison of models, whose products in float32 are that on a GPU too.

    Args:
        work: the comparison, given the hardware to compute on. It is called again on the CPU if it fails on a GPU, and
            keeps nothing of the first call.

    Returns:
        What it returns, and the name of the hardware.
    """
    hardware = _usable_hardware()
    if hardware.is_gpu:
        try:
            with float32_products():
                return work(hardware), hardware.name
        except Exception as error:  # a merge must not fail for the place of its proof
            why = "its memory runs out" if is_out_of_memory(error) else named_reason_of(error)
        # Only here is the exception gone, whose traceback holds what is on the GPU.
        console.say(f"the comparison of models runs on the CPU, since on {hardware.name} {why}")
        torch.cuda.empty_cache()
        hardware = cpu_hardware()
    return work(hardware), hardware.name


def _usable_hardware() -> Hardware:
    """Return the GPU; without any that torch can use, the CPU, since a merge needs none."""
    if torch.cuda.is_available():
        try:
            return detect_hardware()
        except LoratuneError as error:
            console.say(f"the comparison of models runs on the CPU: {error.message}")
    return cpu_hardware()


def room_for(folder: Path, hardware: Hardware) -> torch.device:
    """Return the device for a model that is not computed piece by piece: a GPU if its free memory holds the files."""
    needed = SPARE * sum(path.stat().st_size for path in weight_files(folder))
    return hardware.device if hardware.is_gpu and needed <= free_memory_bytes(hardware) else CPU


@contextmanager
def float32_products() -> Iterator[None]:
    """Keep a GPU from rounding inputs of float32 products to TF32's 10 bits, as it does in convolutions by default."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn)
    allowed = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    try:
        yield
    finally:
        for switch, was_allowed in zip(switches, allowed, strict=True):
            switch.allow_tf32 = was_allowed
