"""Judges how the GPUs of a machine exchange gradients."""

from __future__ import annotations

from collections.abc import Iterator

from loratune.console import memory
from loratune.doctor.facts import Failure, Machine, TorchFacts, Trial
from loratune.doctor.finding import Finding, broken, fine, shell
from loratune.errors import counted

LEAST_SHARED_BYTES = 1e9
"""A container's own /dev/shm has 64 MB, too little for NCCL's buffers between several GPUs."""
WITHOUT = ("NCCL_P2P_DISABLE=1", "NCCL_SHM_DISABLE=1")
"""Variables that switch off a way to exchange; the all-reduce is tried with each where it fails without."""


def judge_several_gpus(machine: Machine) -> Iterator[Finding]:
    """Yield findings about the exchange between several GPUs; none for one GPU."""
    if not isinstance(machine.torch, TorchFacts) or len(machine.torch.gpus) < 2:
        return
    yield _topology(machine.torch)
    tried = machine.exchanges.get("")
    works = isinstance(tried, Trial) and tried.is_right
    shared = machine.shared_memory_bytes
    if shared is not None and shared < LEAST_SHARED_BYTES and not works:
        yield broken(
            "/dev/shm",
            f"{memory(shared)}, too little to exchange through",
            shell("in a container, give it more", "docker run --shm-size 16g IMAGE", IMAGE="yours"),
            shell("else", "sudo mount -o remount,size=16G /dev/shm"),
        )
    elif shared is not None:
        yield fine("/dev/shm", memory(shared))
    if tried is not None:
        yield _exchange(machine, len(machine.torch.gpus), tried)


def _topology(torch: TorchFacts) -> Finding:
    count, indirect = len(torch.gpus), len(torch.indirect)
    pairs = count * (count - 1) // 2
    if not indirect:
        return fine("topology", f"{counted(count, 'GPU')} that read each other's memory")
    return fine("topology", f"{indirect} of {counted(pairs, 'pair')} of GPUs exchange through main memory")


def _exchange(machine: Machine, count: int, tried: Trial | Failure) -> Finding:
    if isinstance(tried, Trial) and tried.is_right:
        return fine("all-reduce", f"{counted(count, 'GPU')} add up a tensor as they should")
    if isinstance(tried, Trial):
        text = "the sum of a tensor over all GPUs is wrong: gradients would be too"
    else:
        text = f"adding up a tensor over {counted(count, 'GPU')} fails: {tried.text}"
    remedies = [
        shell("works here", f"export {variable}")
        for variable, trial in machine.exchanges.items()
        if variable and isinstance(trial, Trial) and trial.is_right
    ]
    detail = shell("see what NCCL does", "NCCL_DEBUG=INFO loratune sft --gpus auto")
    one = shell("use one GPU meanwhile", "export CUDA_VISIBLE_DEVICES=0")
    return broken("all-reduce", text, *(remedies or [detail, one]))
