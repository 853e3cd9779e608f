"""Has one process for each GPU add up a tensor with the others, as training does with gradients."""

from __future__ import annotations

from datetime import timedelta

import torch
from torch import distributed
from torch.multiprocessing import spawn

from loratune.doctor.facts import Trial

HOST = "127.0.0.1"
VALUES = 1 << 22
WAIT = timedelta(minutes=5)
"""The examination's own time limit is shorter."""


def exchange(count: int) -> Trial:
    """Run an all-reduce over NCCL, or over gloo without a GPU, in as many processes.

    Args:
        count: number of processes.

    Returns:
        The share of values that are wrong, as the difference.
    """
    store = distributed.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    spawn(_add_up, (count, store.port), nprocs=count)
    wrong = sum(int(store.get(f"wrong/{number}")) for number in range(count))
    return Trial(wrong / count / VALUES, 0.0)


def _add_up(number: int, count: int, port: int) -> None:
    store = distributed.TCPStore(HOST, port, is_master=False)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=number, world_size=count, timeout=WAIT)
    values = torch.full((VALUES,), float(number + 1), device=device)
    distributed.all_reduce(values)
    store.set(f"wrong/{number}", str(int((values != count * (count + 1) // 2).sum())))
    distributed.barrier()
    distributed.destroy_process_group()
