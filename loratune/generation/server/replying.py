"""A question on its way: places in the queue, and pieces that cross from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import math
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

from loratune.engine.exchange import Piece, Question, joined
from loratune.errors import LoratuneError
from loratune.generation.server.failures import ApiError, from_loratune

if TYPE_CHECKING:
    from loratune.engine.engine import Engine
    from loratune.engine.ticket import Ticket

LONGEST_WAIT_SECONDS = 60
STOPPING = "the server is stopping; try again in a moment"


class Queue:
    """Who is being answered and who waits; one place in it for each question.

    Args:
        engine: answers them.
        slots: how many the engine answers at once.
        most_waiting: how many more may wait.
    """

    def __init__(self, engine: Engine, slots: int, most_waiting: int) -> None:
        self.engine = engine
        self.slots = slots
        self.most = slots + most_waiting
        self.replies: set[Reply] = set()
        self.is_stopping = False
        self.tokenizing = ThreadPoolExecutor(1, "tokenizing")
        """One thread: a tokenizer is not to be used by two at once."""
        self._usual_seconds = 1.0

    async def ask(self, question: Question) -> Reply:
        """Hand a question in.

        Raises:
            ApiError: the queue is full, the server is stopping, or the question cannot be answered.
        """
        if self.is_stopping:
            raise ApiError(503, STOPPING, "stopping", retry_after=5)
        if len(self.replies) >= self.most:
            raise ApiError(429, "too many questions at once; try again later", "queue_full", None, self.retry_after())
        reply = Reply(self)
        self.replies.add(reply)
        try:
            await reply.submit(question)
        except BaseException:
            reply.close()
            raise
        return reply

    def retry_after(self) -> int:
        """Seconds until a place may be free: as long as an answer usually takes, for each round of those that wait."""
        rounds = len(self.replies) / self.slots
        return min(LONGEST_WAIT_SECONDS, max(1, math.ceil(self._usual_seconds * rounds)))

    def leave(self, reply: Reply, seconds: float) -> None:
        """Free a place.

        Args:
            reply: whose.
            seconds: it has been taken.
        """
        self.replies.discard(reply)
        self._usual_seconds += 0.1 * (seconds - self._usual_seconds)

    async def empty(self, seconds: float) -> bool:
        """Take no more questions and wait until the others are answered; False if some are not, in so many seconds."""
        self.is_stopping = True
        end = time.monotonic() + seconds
        while self.replies and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return not self.replies

    def end_all(self) -> None:
        """End all answers where they are."""
        for reply in self.replies:
            reply.cancel()


class Reply:
    """The answer to one question as it comes. To be closed by whoever has asked."""

    def __init__(self, queue: Queue) -> None:
        self.started = time.monotonic()
        self.prompt_tokens = 0
        self._queue = queue
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        self._failure: Piece | None = None
        """Came behind text that had to be told first."""
        self._ticket: Ticket | None = None
        self._is_cancelled = False
        self._is_open = True

    async def submit(self, question: Question) -> None:
        """Hand the question to the engine.

        Raises:
            ApiError: it cannot be answered.
        """
        try:
            await self._loop.run_in_executor(self._queue.tokenizing, self._submit, question)
        except LoratuneError as error:
            raise from_loratune(error) from error

    def _submit(self, question: Question) -> None:
        if self._is_cancelled:
            self._deliver(Piece(finish="cancelled"))
            return
        ticket = self._queue.engine.submit(question, self._deliver)
        self.prompt_tokens = ticket.prompt_tokens
        self._ticket = ticket
        if self._is_cancelled:  # while the question was handed in, when there was no ticket yet
            ticket.cancel()

    def _deliver(self, piece: Piece) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    async def next(self, seconds: float | None = None) -> Piece:
        """What has come since the last piece, as one; an empty piece if nothing has, in so many seconds.

        Raises:
            ApiError: the engine has failed, or the server is stopping.
        """
        try:
            piece = self._failure if self._failure else await asyncio.wait_for(self._pieces.get(), seconds)
        except asyncio.TimeoutError:
            return Piece()
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

    async def whole(self) -> Piece:
        """The whole answer as one piece.

        Raises:
            ApiError: as `next`.
        """
        pieces = [Piece()]
        while not pieces[-1].finish:
            pieces.append(await self.next())
        return joined(*pieces)

    def cancel(self) -> None:
        """End the answer within a token."""
        self._is_cancelled = True
        if self._ticket:
            self._ticket.cancel()

    def close(self) -> None:
        """End the answer if it has not ended, and free its place."""
        if self._is_open:
            self._is_open = False
            self.cancel()
            self._queue.leave(self, time.monotonic() - self.started)
