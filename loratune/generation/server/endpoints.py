"""Turns requests into responses, complete or streamed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from loratune.engine.types import Delta, GenerationRequest
from loratune.generation.server.failures import ApiError
from loratune.generation.server.metrics import Metrics, Stopwatch
from loratune.generation.server.offered import OfferedAdapters
from loratune.generation.server.request_queue import Leasing, Queue, Reply
from loratune.generation.server.schemas import ChatRequest, CompletionRequest
from loratune.generation.server.serializers import ChatForm, Serializer, TextForm, event
from loratune.nearest import nearest

QUIET_SECONDS = 10.0
"""A stream without text for this long gets a comment, so that proxies do not close it."""

MOST_SHOWN, MOST_COMPARED = 20, 1000
"""Names of models in a message, and those that an unknown name is compared with."""


class Endpoints:
    """Answers requests with one engine.

    Args:
        queue: passes requests to the engine.
        metrics: receive timing and counts.
        most_new_tokens: the server's limit of tokens per answer.
        offered: further adapters, if there is a store of them.
    """

    def __init__(
        self, queue: Queue, metrics: Metrics, most_new_tokens: int, offered: OfferedAdapters | None = None
    ) -> None:
        self.queue = queue
        self.offered = offered
        self.metrics = metrics
        self.most_new_tokens = most_new_tokens

    async def answer(self, body: ChatRequest | CompletionRequest, request: Request) -> Response:
        """Return the response to a request.

        Raises:
            ApiError: the request failed.
        """
        leasing = await self._leasing(body.model)
        question = self._question(body)
        form = ChatForm() if isinstance(body, ChatRequest) else TextForm()
        letter = Serializer(form, body.model, body.wants_usage)
        reply = await self.queue.ask(question, leasing)
        watch = Stopwatch(self.metrics, body.model, reply.started)
        headers = {"x-request-id": letter.id}
        if body.stream:
            return EventStream(reply, _events(reply, letter, watch), headers)
        try:
            piece = await _while_connected(request, reply)
        finally:
            reply.close()
        if piece is None:
            watch.ended("cancelled", reply.prompt_tokens, 0)
            return Response(status_code=499)  # the client has disconnected
        watch.text_came()
        watch.ended(str(piece.finish), reply.prompt_tokens, piece.tokens)
        return JSONResponse(letter.whole(piece, reply.prompt_tokens), headers=headers)

    async def _leasing(self, model: str) -> Leasing | None:
        """Return what lends the adapter to a request; None for a model that is always there.

        Raises:
            ApiError: there is no such model.
        """
        engine = self.queue.engine
        if model in (engine.base_name, *engine.adapters):
            return None
        found = await self.offered.find(model) if self.offered else None
        if found is None or self.offered is None:
            raise await self.unknown(model)
        return partial(self.offered.lease, found)

    async def unknown(self, model: str) -> ApiError:
        """Return the error for an unknown model, status 404."""
        engine = self.queue.engine
        known = [engine.base_name, *engine.adapters, *(await self.offered.all() if self.offered else ())]
        more = f" and {len(known) - MOST_SHOWN:,} more" if len(known) > MOST_SHOWN else ""
        near = await asyncio.to_thread(nearest, model, known[:MOST_COMPARED])  # long names take seconds
        meant = f"did you mean {near}? " if near else ""
        message = f"no model is called {model}; {meant}there are {', '.join(known[:MOST_SHOWN])}{more}"
        return ApiError(404, message, "model_not_found", "model")

    def _question(self, body: ChatRequest | CompletionRequest) -> GenerationRequest:
        adapter = None if body.model == self.queue.engine.base_name else body.model
        sampling = body.sampling(self.most_new_tokens)
        return GenerationRequest(body.asked(), sampling, adapter, tools=body.offered(), most_calls=body.most_calls)


class EventStream(StreamingResponse):
    """Server-sent events; however the stream ends, it cancels the generation."""

    def __init__(self, reply: Reply, events: AsyncIterator[str], headers: dict[str, str]) -> None:
        super().__init__(events, headers={**headers, "X-Accel-Buffering": "no"}, media_type="text/event-stream")
        self.reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.reply.close()


async def _events(reply: Reply, letter: Serializer, watch: Stopwatch) -> AsyncIterator[str]:
    """Yield the events of a stream. After a failure, the last event describes it, and [DONE] is omitted."""
    tokens, finish = 0, "cancelled"
    try:
        yield letter.opening()
        piece = Delta()
        while not piece.finish:
            piece = await reply.next(QUIET_SECONDS)
            if piece.has_come:
                watch.text_came()
            tokens = piece.tokens or tokens
            yield letter.part(piece) or ": keep-alive\n\n"
        finish = piece.finish
        yield letter.closing(reply.prompt_tokens, tokens)
    except ApiError as error:
        finish = "error"
        yield event(error.body())
    finally:
        watch.ended(finish, reply.prompt_tokens, tokens)


async def _while_connected(request: Request, reply: Reply) -> Delta | None:
    """Return the complete answer; None if the client disconnects first."""
    whole = asyncio.ensure_future(reply.whole())
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
        return whole.result() if whole.done() else None
    finally:
        whole.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    message: Any = {}
    while message.get("type") != "http.disconnect":
        message = await request.receive()
