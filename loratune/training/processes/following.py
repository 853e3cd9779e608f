"""Lets the first process work with a sharded base alone: the others make a pass whenever it does, to gather weights.

What the others compute does not count, so their inputs are two tokens, and they need no cache.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import distributed

from loratune.model.architecture.structure import causal_model, decoder_of
from loratune.protocols import CausalModel
from loratune.training.processes.group import lost_connection
from loratune.training.processes.watch import PULSE_SECONDS, connected, in_background

RELEASED = "loratune/released"
"""A key in the store: the first process needs the others no more."""
GRACE_SECONDS = 5.0
"""How long a process that is needed no more may take to end its pass."""


@contextmanager
def leading(model: CausalModel) -> Iterator[None]:
    """Have the other processes, which `follow`, make each pass of this one with it.

    Args:
        model: a causal language model with a sharded base, with or without adapters. Each pass through its decoder has
            to be followed by one through its head, as its own forward does. After one that fails, the others are left
            in it, so each later one raises.
    """
    is_within = False

    def before_pass(*_: object) -> None:
        nonlocal is_within
        if is_within:
            raise RuntimeError("an earlier pass has failed, in which the other processes wait")
        is_within = True
        _announce(True)

    def after_pass(*_: object) -> None:
        nonlocal is_within
        is_within = False

    decoder: Any = decoder_of(model)
    hooks = [
        decoder.register_forward_pre_hook(before_pass, prepend=True),  # ahead of the one that gathers
        decoder.register_forward_hook(after_pass),
    ]
    try:
        yield
        _announce(False)  # after a failure, the others may wait for this one in a pass, and do not hear it
    finally:
        for hook in hooks:
            hook.remove()
        with suppress(RuntimeError):
            connected().set(RELEASED, "")


def follow(model: CausalModel) -> None:
    """Make passes until the first process has ended its work.

    If it fails within a pass, the others wait for it there until the connection is lost. Where that is not noticed,
    this process ends: the run is finished by then.
    """
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    base, is_over = causal_model(model).eval(), threading.Event()
    in_background(lambda: _end_if_released(is_over))
    try:
        while _announce(False):
            with torch.no_grad():
                base(input_ids=ids, use_cache=False)
    except RuntimeError as error:
        if lost_connection(error) is None:
            raise
    finally:
        is_over.set()


def _announce(goes_on: bool) -> bool:
    """Return what the first process says; its word goes over the CPU's connections."""
    word = torch.tensor(goes_on)
    distributed.broadcast(word, 0)
    return bool(word)


def _end_if_released(is_over: threading.Event) -> None:
    with suppress(RuntimeError):  # the store is gone with the first process
        store = connected()
        while not store.check([RELEASED]):
            if is_over.wait(PULSE_SECONDS):
                return
    if not is_over.wait(GRACE_SECONDS):
        os._exit(0)
