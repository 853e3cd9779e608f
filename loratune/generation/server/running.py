"""Runs the server process, and drains running requests at the end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import uvicorn
from fastapi import FastAPI

from loratune import console
from loratune.errors import Interrupted, counted
from loratune.generation.server.addresses import Address
from loratune.generation.server.application import Limits, create_application
from loratune.generation.server.connection import Connection
from loratune.generation.server.middleware import Access
from loratune.generation.server.request_queue import Queue
from loratune.runtime import signals_to

if TYPE_CHECKING:
    from loratune.engine.engine import Engine

FLUSH_SECONDS = 2
Drain: TypeAlias = Callable[[], Coroutine[Any, Any, None]]


def run(engine: Engine, address: Address, access: Access, limits: Limits) -> None:
    """Serve until a signal arrives, then drain running requests.

    Args:
        engine: a loaded model; closed at the end.
        address: the bound address; clients can connect from now on.
        access: who may send requests.
        limits: limits of the load.

    Raises:
        Interrupted: always, with the signal.
    """
    queue = Queue(engine, limits.slots, limits.waiting)
    app = create_application(engine, queue, access, limits)
    try:
        serve_until_signal(app, address, lambda: _drain(queue, limits.grace_seconds))
    finally:
        engine.close()


def serve_until_signal(app: FastAPI, address: Address, drain: Drain) -> None:
    """Serve an application until a signal arrives.

    Args:
        app: the application.
        address: the bound address.
        drain: ends what is under way; a second signal does not wait for it.

    Raises:
        Interrupted: always, with the signal.
    """
    number = asyncio.run(_serve(make_server(app), drain, address.socket))
    raise Interrupted(number, f"stopped by {signal.Signals(number).name}")


def make_server(app: FastAPI) -> uvicorn.Server:
    """Return a uvicorn server with the limits of `Connection`, without logging and signal handlers."""
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=FLUSH_SECONDS,
    )
    return _Server(config)


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(server: uvicorn.Server, drain: Drain, address: socket.socket) -> int:
    """Serve until a signal arrives, and return its number."""
    came: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    with signals_to(lambda number, _: loop.call_soon_threadsafe(came.put_nowait, number)):
        return await _serve_until(came, server, drain, address)


async def _serve_until(came: asyncio.Queue[int], server: uvicorn.Server, drain: Drain, address: socket.socket) -> int:
    serving = asyncio.create_task(server.serve([address]))
    waiting = asyncio.create_task(came.get())
    await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if serving.done():
        serving.result()
    first = await waiting
    draining = asyncio.create_task(drain())
    again = asyncio.create_task(came.get())
    await asyncio.wait({draining, again}, return_when=asyncio.FIRST_COMPLETED)
    if again.done():
        os._exit(128 + again.result())  # immediately, without waiting for requests or threads
    server.should_exit = True
    await serving
    return first


async def _drain(queue: Queue, grace_seconds: float) -> None:
    if queue.replies:
        console.say(
            f"stopping after {counted(len(queue.replies), 'running answer')}; repeat the signal to stop at once"
        )
    if not await queue.empty(grace_seconds):
        queue.end_all()
        await queue.empty(1)
