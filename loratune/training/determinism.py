"""Deterministic kernels, with which a run on a GPU has the same bits each time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from loratune.errors import Exit, LoratuneError

CUBLAS_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
"""Variable and value with which cuBLAS sums in a fixed order; read when a process uses cuBLAS for the first time."""


def request_deterministic_cublas() -> None:
    """Set cuBLAS's workspace unless the user has; has an effect before the first matrix product only."""
    os.environ.setdefault(*CUBLAS_WORKSPACE)


@contextmanager
def deterministic_kernels(is_wanted: bool) -> Iterator[None]:
    """Have torch use deterministic kernels only.

    Only optimizer steps need them: sampling, for example, has operators without one.

    Raises:
        LoratuneError: an operator of the step has no deterministic kernel on this device.
    """
    if not is_wanted:
        yield
        return
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs a pass over each new tensor
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        operator = str(error).partition(" does not have")[0]
        raise LoratuneError(
            f"training.deterministic: torch has no deterministic kernel for {operator} on this device; set it to false",
            Exit.USAGE,
        ) from error
    finally:
        torch.use_deterministic_algorithms(False)
