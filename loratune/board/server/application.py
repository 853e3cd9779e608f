"""The FastAPI application: three addresses that are read, and the page."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response

from loratune import __version__
from loratune.board.metrics import FollowedMetrics
from loratune.board.opened import OpenedRun, open_run
from loratune.board.search import Found, Search
from loratune.board.server.values import comparison_values, list_values, plain, run_values
from loratune.errors import LoratuneError
from loratune.generation.server.failures import ApiError, handle_failures
from loratune.generation.server.middleware import Access, AuthMiddleware, HostOriginMiddleware
from loratune.generation.server.page_files import CHAT_PAGE, Page, add_page
from loratune.printable import visible

OWN_PAGE = Path(__file__).parent / "page"
MOST_RUNS = 6
"""That are compared at once, as many as there are colours."""


def create_application(folder: Path, access: Access) -> FastAPI:
    """Return the application.

    Args:
        folder: folder of the runs.
        access: who may read.

    Raises:
        LoratuneError: there is no such folder.
    """
    app = FastAPI(title="loratune runs", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    search, metrics = Search(folder), FollowedMetrics()

    # Functions without async, which FastAPI runs in threads: reading a folder would stop all other answers.
    @app.get("/v1/runs")
    def show_list(request: Request) -> Response:
        return _answer(request, list_values(search.find(), folder))

    @app.get("/v1/run")
    def show_run(request: Request, name: str) -> Response:
        found = search.find()
        return _answer(request, run_values(found, _opened(found, name, metrics)))

    @app.get("/v1/comparison")
    def show_comparison(request: Request, run: Annotated[list[str], Query()]) -> Response:
        if not 2 <= len(run) <= MOST_RUNS:
            raise ApiError(400, f"give 2 to {MOST_RUNS} runs", "wrong_number", "run")
        found = search.find()
        return _answer(request, comparison_values([_opened(found, name, metrics) for name in run]))

    add_page(app, Page(CHAT_PAGE, OWN_PAGE))
    handle_failures(app)
    # The middleware added last handles a request first.
    app.add_middleware(AuthMiddleware, access=access)
    app.add_middleware(HostOriginMiddleware, access=access)
    return app


def _opened(found: Found, name: str, metrics: FollowedMetrics) -> OpenedRun:
    """Open a run by its name in the list; a name is never used as a path."""
    try:
        run = next((run for run in found.runs if visible(run.name) == name), None) or found.run(name)
        return open_run(found, run, metrics.read)
    except LoratuneError as error:
        raise ApiError(404, str(error), "not_found", "name") from error


def _answer(request: Request, values: dict[str, Any] | Sequence[Any]) -> Response:
    """Return values as JSON, or say that they are those that the page has."""
    body = json.dumps(plain(values), allow_nan=False).encode()
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {"ETag": tag, "Cache-Control": "no-store"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type="application/json")
