"""The process group of a run: connects its processes, and shares what the first one knows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from torch import distributed

from loratune.errors import Exit, LoratuneError, first_line_of
from loratune.model.hardware import Hardware
from loratune.runtime import is_main_process, process_count, process_number

LONGEST_START = timedelta(hours=2)
"""How long connected processes wait for each other: until the slowest machine has its base. `Watch` bounds training."""
JOINED = "loratune/joined"
"""Prefix of a key in the store for each process that has started."""
GLOO = re.compile(r"\[\S*gloo/transport\S*\] (?P<reason>.*?)(\. This is typically|$)", re.DOTALL)
"""The errors of gloo's connections, which have no class of their own."""
Made = TypeVar("Made")


@contextmanager
def process_group(hardware: Hardware, seconds: float) -> Iterator[None]:
    """Connect the processes of a run, and release the connections at the end; no effect for one process.

    Objects and the start's agreements go over gloo, so that they need no memory of a GPU.

    Args:
        hardware: that the process uses.
        seconds: how long to wait for a process that has not started.

    Raises:
        LoratuneError: a process has not started, or the connection to another one was lost.
    """
    if not hardware.is_distributed:
        yield
        return
    with _lost_connections_explained():
        backend = "cpu:gloo,cuda:nccl" if hardware.is_gpu else "gloo"
        store = _joined(seconds)
        distributed.init_process_group(
            backend, store=store, rank=process_number(), world_size=process_count(), timeout=LONGEST_START
        )
        yield
        distributed.destroy_process_group()  # not after an error, where it could wait for a process that is gone


def _joined(seconds: float) -> distributed.Store:
    """Return the store of all processes once each has started, so that one that never does is found soon.

    Raises:
        LoratuneError: names those that are missing, where the store is there.
    """
    keys = {number: f"{JOINED}/{number}" for number in range(process_count())}
    limit, store = timedelta(seconds=seconds), None
    try:
        store, number, _ = next(distributed.rendezvous("env://", timeout=limit))
        store.set(keys[number], "")
        store.wait(list(keys.values()), limit)
    except distributed.DistError as error:
        missing = [str(number) for number, key in keys.items() if store and not store.check([key])]
        who = f"process {', '.join(missing)}" if missing else "one"
        raise LoratuneError(f"{who} of {len(keys)} has not started within {seconds:g} seconds", Exit.PEER) from error
    return store


def lost_connection(error: RuntimeError) -> str | None:
    """Return why a connection to another process was lost; None if an error says something else."""
    of_gloo = GLOO.search(str(error))
    if of_gloo:
        return of_gloo["reason"]
    return first_line_of(error) if isinstance(error, distributed.DistError) else None


@contextmanager
def _lost_connections_explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = lost_connection(error)
        if reason is None:
            raise
        raise LoratuneError(
            f"process {process_number()} of {process_count()} lost the connection to another one: {reason}", Exit.PEER
        ) from error


def from_first(make: Callable[[], Made]) -> Made:
    """Return in every process what the first one makes; each process has to call this.

    Args:
        make: called in the first process alone; its result has to be picklable.
    """
    if process_count() == 1:
        return make()
    made = [make() if is_main_process() else None]
    distributed.broadcast_object_list(made)
    return made[0]  # type: ignore[return-value]


def from_all(own: Made) -> list[Made]:
    """Return the values of all processes in their order; each process has to call this."""
    if process_count() == 1:
        return [own]
    values = [own] * process_count()
    distributed.all_gather_object(values, own)
    return values


def to_first(own: Made) -> list[Made]:
    """Return the values of all processes in the first one, and an empty list in the others; each has to call this."""
    if process_count() == 1:
        return [own]
    values = [own] * process_count() if is_main_process() else None
    distributed.gather_object(own, values)
    return values or []
