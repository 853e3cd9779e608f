"""Errors in the format that OpenAI's clients expect: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from loratune.data.tools.tool_rendering import ToolError
from loratune.errors import Exit, LoratuneError

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
"""Status → type; other 4xx are invalid_request_error, 5xx are server_error."""
TAG = "~"
"""First character of union tags, which are removed from the location of an error."""
UNKNOWN: Final = "extra_forbidden"
"""Kind of the error of a field that requests do not have; with `meant` in its context where another one is like it."""
WORDS = {UNKNOWN: "is not supported", "missing": "is missing", "json_invalid": "is not valid JSON"}


class ApiError(Exception):
    """A request that fails.

    Args:
        status: HTTP status of the response.
        message: what is wrong, and what to do.
        code: identifier for programs.
        param: location in the request's body.
        retry_after: seconds after which a retry may succeed.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        otherwise = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = TYPES.get(self.status, otherwise)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status == 408:
            headers["Connection"] = "close"
        # ASCII only, because a message may quote an unpaired surrogate.
        return Response(json.dumps(self.body()), self.status, headers, media_type="application/json")


def from_loratune(error: LoratuneError) -> ApiError:
    """Convert an error of the engine."""
    if error.exit_code is Exit.IO:
        return ApiError(503, str(error), "out_of_memory", retry_after=1)
    # The engine rejects prompts that are too long; a template rejects an order of roles.
    code = "context_length_exceeded" if error.exit_code is Exit.USAGE else "invalid_value"
    return ApiError(400, str(error), code, "tools" if isinstance(error, ToolError) else "messages")


def refused_adapter(error: LoratuneError, folder: Path) -> ApiError:
    """Convert the refusal of an adapter; where the server keeps its adapters is left out.

    Args:
        error: the refusal.
        folder: where that is.
    """
    message = str(error)
    for place in (str(folder), str(folder.absolute())):
        message = message.replace(f"{place}/", "")
    if error.exit_code is Exit.IO:
        return ApiError(503, message, "adapter_not_loaded", "model", retry_after=1)
    return ApiError(400, message, "adapter_refused", "model")


def handle_failures(app: FastAPI) -> None:
    """Return every failure of a request in this format."""

    async def known(_: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return _from_validation(error).response()

    async def plain(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = {404: "not_found", 405: "method_not_allowed", 400: "invalid_json"}.get(error.status_code)
        message = "the body cannot be read as JSON" if error.status_code == 400 else error.detail
        response = ApiError(error.status_code, message, code).response()
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(ApiError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, plain)


def _from_validation(error: RequestValidationError) -> ApiError:
    """Convert the first validation problem, with its location."""
    problem = error.errors()[0]
    kind, place = problem["type"], problem["loc"][1:]
    if kind == "json_invalid":
        message = f"the body is not valid JSON: {problem['ctx']['error']} at character {place[0]}"
        return ApiError(400, message, "invalid_json")
    if not place:
        return ApiError(400, "the body must be a JSON object", "invalid_type")
    param = ".".join(str(part) for part in place if not str(part).startswith(TAG))
    text = WORDS.get(kind) or problem["msg"].removeprefix("Value error, ")
    if problem.get("ctx", {}).get("max_length") == 0:  # a field that is only accepted while empty
        text = WORDS[UNKNOWN]
    if near := problem.get("ctx", {}).get("meant"):
        text += f"; did you mean {near}?"
    return ApiError(400, f"{param}: {text[0].lower()}{text[1:]}", kind, param)
