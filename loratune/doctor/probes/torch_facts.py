"""What torch is built for, and the devices that it finds. Nothing is computed on a GPU."""

from __future__ import annotations

import itertools

import torch

from loratune.doctor.facts import Gpu, TorchFacts
from loratune.model.hardware import cpu_hardware, usable_cores, why_no_gpu
from loratune.model.memory import free_main_memory_bytes


def torch_facts() -> TorchFacts:
    has_gpu = torch.cuda.is_available()
    count = torch.cuda.device_count() if has_gpu else 0
    return TorchFacts(
        version=str(torch.__version__),
        cuda=torch.version.cuda,
        architectures=tuple(torch.cuda.get_arch_list()) if has_gpu else (),
        gpus=tuple(_gpu(number) for number in range(count)),
        reason="" if has_gpu else why_no_gpu(),
        indirect=tuple(
            pair for pair in itertools.combinations(range(count), 2) if not torch.cuda.can_device_access_peer(*pair)
        ),
        cpu_has_bfloat16=cpu_hardware().has_bfloat16,
        threads=torch.get_num_threads(),
        cores=usable_cores(),
        free_memory_bytes=free_main_memory_bytes(),
    )


def _gpu(number: int) -> Gpu:
    with torch.cuda.device(number):
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    memory_bytes = torch.cuda.get_device_properties(number).total_memory
    return Gpu(torch.cuda.get_device_name(number), torch.cuda.get_device_capability(number), memory_bytes, has_bfloat16)
