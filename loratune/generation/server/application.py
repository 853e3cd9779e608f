"""The FastAPI application: routes and middleware."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware

from loratune import __version__
from loratune.generation.server.endpoints import Endpoints
from loratune.generation.server.failures import handle_failures
from loratune.generation.server.metrics import Metrics, MetricsMiddleware
from loratune.generation.server.middleware import (
    BODY_SECONDS,
    Access,
    AuthMiddleware,
    BodyLimitMiddleware,
    HostOriginMiddleware,
)
from loratune.generation.server.model_routes import add_loading, add_models
from loratune.generation.server.offered import OfferedAdapters
from loratune.generation.server.page_files import CHAT_PAGE, Page, add_page
from loratune.generation.server.request_queue import Queue
from loratune.generation.server.schemas import ChatRequest, CompletionRequest
from loratune.generation.server.serializers import FAILURES, ChatCompletion, Health, TextCompletion

if TYPE_CHECKING:
    from loratune.engine.engine import Engine

ABOUT = """\
Answers of a model and its adapters, with the API of OpenAI. Decoding is greedy unless the request sets a temperature.
Unsupported request fields are rejected with an error that names them."""
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/event-stream": {"schema": EVENT}},
        "description": "The answer; with stream, in events whose data are chunks as JSON, and [DONE] at the end.",
    }
}


@dataclass(frozen=True)
class Limits:
    """Limits of the server's load."""

    slots: int = 32
    """Concurrent requests."""
    waiting: int = 64
    """Requests waiting for a slot."""
    new_tokens: int = 4096
    """Maximum tokens of an answer."""
    body_seconds: float = BODY_SECONDS
    """Maximum time to receive a request's body."""
    grace_seconds: float = 25.0
    """Time for running requests after a signal; less than the 30 s that container runtimes wait."""


def create_application(engine: Engine, queue: Queue, access: Access, limits: Limits) -> FastAPI:
    """Return the server's application.

    Args:
        engine: a loaded model.
        queue: passes requests to the engine.
        access: who may send requests.
        limits: limits of the load.
    """
    app = FastAPI(
        title="loratune",
        version=__version__,
        description=ABOUT,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        redirect_slashes=False,
    )
    metrics, offered = Metrics(queue), None
    if engine.store:
        offered = OfferedAdapters(engine.store, [engine.base_name, *engine.adapters])
        metrics.add_store(engine.store)
        add_loading(app, offered)
    responder = Endpoints(queue, metrics, limits.new_tokens, offered)
    _add_answers(app, responder)
    add_models(app, engine, responder)
    _add_state(app, queue, metrics)
    add_page(app, Page(CHAT_PAGE))
    handle_failures(app)
    # The middleware added last handles a request first.
    app.add_middleware(BodyLimitMiddleware, body_seconds=limits.body_seconds)
    app.add_middleware(AuthMiddleware, access=access)
    if access.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(access.origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After", "x-request-id"],
        )
    app.add_middleware(HostOriginMiddleware, access=access)
    app.add_middleware(MetricsMiddleware, metrics=metrics)
    if not offered:
        _describe_models(app, [engine.base_name, *engine.adapters])
    return app


def _add_answers(app: FastAPI, responder: Endpoints) -> None:
    bearer = [Depends(HTTPBearer(auto_error=False))]  # only documents the scheme; Lock has checked the key

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={**FAILURES, **EVENTS},
        dependencies=bearer,
    )
    async def chat(body: ChatRequest, request: Request) -> Any:
        """Answer the last message of a conversation."""
        return await responder.answer(body, request)

    @app.post(
        "/v1/completions",
        response_model=TextCompletion,
        responses={**FAILURES, **EVENTS},
        dependencies=bearer,
    )
    async def complete(body: CompletionRequest, request: Request) -> Any:
        """Continue a text without a chat template."""
        return await responder.answer(body, request)


def _describe_models(app: FastAPI, names: list[str]) -> None:
    """List the models in the API's schema."""
    schemas = app.openapi()["components"]["schemas"]
    for request in (ChatRequest, CompletionRequest):
        schemas[request.__name__]["properties"]["model"]["enum"] = names


def _add_state(app: FastAPI, queue: Queue, metrics: Metrics) -> None:
    @app.get("/health", responses={503: {"model": Health, "description": "The server is stopping."}})
    async def health(response: Response) -> Health:
        """Return whether the server accepts requests."""
        response.status_code = 503 if queue.is_stopping else 200
        return Health(status="stopping" if queue.is_stopping else "ok")

    @app.get(
        "/metrics",
        response_class=Response,
        responses={**FAILURES, 200: {"content": {CONTENT_TYPE_LATEST: {"schema": {"type": "string"}}}}},
        dependencies=[Depends(HTTPBearer(auto_error=False))],
    )
    async def show_metrics() -> Response:
        """Return the metrics in Prometheus' format."""
        return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)
