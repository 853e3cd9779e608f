"""The queue of requests, and the transfer of chunks from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias

from loratune.engine.types import Delta, GenerationRequest, joined
from loratune.errors import LoratuneError
from loratune.generation.server.failures import ApiError, from_loratune

if TYPE_CHECKING:
    from loratune.engine.engine import Engine
    from loratune.engine.loading import Lease
    from loratune.engine.request_handle import RequestHandle

Leasing: TypeAlias = Callable[[], Awaitable["Lease"]]
"""Waits for an adapter, and lends it to one request."""
LONGEST_WAIT_SECONDS = 60
STOPPING = "the server is stopping; try again in a moment"


class Queue:
    """Running and waiting requests, up to a maximum number.

    Args:
        engine: answers the requests.
        slots: number of concurrent requests.
        most_waiting: maximum number of waiting requests.
    """

    def __init__(self, engine: Engine, slots: int, most_waiting: int) -> None:
        self.engine = engine
        self.slots = slots
        self.most = slots + most_waiting
        self.replies: set[Reply] = set()
        self.is_stopping = False
        self.tokenizing = ThreadPoolExecutor(1, "tokenizing")
        """A single thread, because tokenizers are not thread-safe."""
        self._usual_seconds = 1.0

    async def ask(self, question: GenerationRequest, leasing: Leasing | None = None) -> Reply:
        """Submit a request.

        Args:
            question: the request.
            leasing: lends it an adapter of a store.

        Raises:
            ApiError: the queue is full, the server is stopping, or the adapter is refused, or the request is invalid.
        """
        if self.is_stopping:
            raise ApiError(503, STOPPING, "stopping", retry_after=5)
        if len(self.replies) >= self.most:
            raise ApiError(429, "too many requests; try again later", "queue_full", None, self.retry_after())
        reply = Reply(self)
        self.replies.add(reply)
        try:
            await reply.submit(question, await leasing() if leasing else None)
        except BaseException:
            reply.close()
            raise
        return reply

    def retry_after(self) -> int:
        """Estimate the seconds until a place is free, from the average duration and the length of the queue."""
        rounds = len(self.replies) / self.slots
        return min(LONGEST_WAIT_SECONDS, max(1, math.ceil(self._usual_seconds * rounds)))

    def leave(self, reply: Reply, seconds: float) -> None:
        """Free a request's place.

        Args:
            reply: the request's reply.
            seconds: the request's duration.
        """
        self.replies.discard(reply)
        self._usual_seconds += 0.1 * (seconds - self._usual_seconds)

    async def empty(self, seconds: float) -> bool:
        """Accept no more requests and wait until all are answered; return False after a timeout."""
        self.is_stopping = True
        end = time.monotonic() + seconds
        while self.replies and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return not self.replies

    def end_all(self) -> None:
        for reply in self.replies:
            reply.cancel()


class Reply:
    """The streamed answer to one request; the caller has to close it."""

    def __init__(self, queue: Queue) -> None:
        self.started = time.monotonic()
        self.prompt_tokens = 0
        self._queue = queue
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Delta] = asyncio.Queue()
        self._failure: Delta | None = None
        """A failure that arrived after text, which is returned first."""
        self._handle: RequestHandle | None = None
        self._is_cancelled = False
        self._is_open = True

    async def submit(self, question: GenerationRequest, lease: Lease | None = None) -> None:
        """Pass the request to the engine, with the adapter that it was lent.

        Raises:
            ApiError: the request is invalid.
        """
        submitting = self._queue.tokenizing.submit(self._submit, question, lease)
        try:
            await asyncio.wrap_future(submitting)
        except LoratuneError as error:
            raise from_loratune(error) from error
        except asyncio.CancelledError:
            if submitting.cancel() and lease:  # it has not begun, and never will
                lease.release()
            raise

    def _submit(self, question: GenerationRequest, lease: Lease | None) -> None:
        if self._is_cancelled:
            if lease:
                lease.release()
            self._deliver(Delta(finish="cancelled"))
            return
        lent = {"lease": lease} if lease else {}
        handle = self._queue.engine.submit(question, self._deliver, **lent)
        self.prompt_tokens = handle.prompt_tokens
        self._handle = handle
        if self._is_cancelled:  # cancelled during submission, before the handle existed
            handle.cancel()

    def _deliver(self, piece: Delta) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    async def next(self, seconds: float | None = None) -> Delta:
        """Return everything that arrived since the last call as one chunk; an empty chunk after a timeout.

        Raises:
            ApiError: the engine failed, or the server is stopping.
        """
        try:
            piece = self._failure if self._failure else await asyncio.wait_for(self._pieces.get(), seconds)
        except asyncio.TimeoutError:
            return Delta()
        while not self._pieces.empty():
            following = self._pieces.get_nowait()
            if following.finish in ("error", "cancelled"):
                self._failure = following
                return piece
            piece = joined(piece, following)
        if isinstance(piece.error, LoratuneError):
            raise from_loratune(piece.error) from piece.error
        if piece.error is not None:
            raise piece.error
        if piece.finish == "cancelled":
            raise ApiError(503, STOPPING, "stopping", retry_after=5)
        return piece

    async def whole(self) -> Delta:
        """Return the complete answer as one chunk.

        Raises:
            ApiError: see `next`.
        """
        pieces = [Delta()]
        while not pieces[-1].finish:
            pieces.append(await self.next())
        return joined(*pieces)

    def cancel(self) -> None:
        """Cancel the answer; generation stops within one token."""
        self._is_cancelled = True
        if self._handle:
            self._handle.cancel()

    def close(self) -> None:
        """Cancel the answer if it is unfinished, and free its place."""
        if self._is_open:
            self._is_open = False
            self.cancel()
            self._queue.leave(self, time.monotonic() - self.started)
