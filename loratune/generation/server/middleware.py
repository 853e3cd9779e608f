"""Middleware that checks a request before it is parsed: host, origin, API key, size and speed of the body."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loratune.generation.server.failures import ApiError

OPEN_PATHS = ("/", "/health")
OPEN_FOLDER = "/page/"
LOAD_PATH, UNLOAD_PATH = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
PATHS_WITH_BODY = ("/v1/chat/completions", "/v1/completions", LOAD_PATH, UNLOAD_PATH)
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
LARGEST_BODY = 4 * 2**20
BODY_SECONDS = 20.0


@dataclass(frozen=True)
class Access:
    """Who may send requests."""

    api_key: str | None
    """None accepts requests without a key."""
    hosts: frozenset[str] = LOOPBACK_NAMES
    """Host names that requests may use."""
    any_address: bool = False
    """Whether requests may use any IP address as host, because the server listens on all of them."""
    origins: frozenset[str] = frozenset()
    """Origins of other web pages that may send requests: scheme://host:port."""


class HostOriginMiddleware:
    """Rejects requests with a foreign Host or Origin header.

    Otherwise a web page whose name resolves to this machine (DNS rebinding) could send requests with the rights of its
    own origin.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app = app
        self.access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or respond with an error."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        try:
            self._check_host(host)
            self._check_origin(headers.get("origin"), host)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check_host(self, host: str) -> None:
        name = _name_of(host)
        if name in self.access.hosts or (self.access.any_address and _is_address(name)):
            return
        called = name or "nothing"
        raise ApiError(403, f"the host name {called} is not allowed; --allow-host {called} allows it", "wrong_host")

    def _check_origin(self, origin: str | None, host: str) -> None:
        if origin is None or origin in self.access.origins or origin in (f"http://{host}", f"https://{host}"):
            return
        raise ApiError(
            403, f"requests from pages of {origin} are not allowed; --allow-origin allows them", "wrong_origin"
        )


class AuthMiddleware:
    """Rejects requests without the API key, except for the page and /health."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app = app
        self._expected = _digest(access.api_key) if access.api_key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or respond with 401."""
        path = scope["path"]
        is_open = self._expected is None or path in OPEN_PATHS or path.startswith(OPEN_FOLDER)
        if is_open or self._is_key(Headers(scope=scope).get("authorization", "")):
            await self.app(scope, receive, send)
            return
        message = "the header Authorization: Bearer API_KEY is missing, or the key is wrong"
        await ApiError(401, message, "invalid_api_key").response()(scope, receive, send)

    def _is_key(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        assert self._expected is not None
        # Digests have equal lengths, so the comparison time does not reveal the key's length.
        return hmac.compare_digest(_digest(key.strip()), self._expected) and scheme.lower() == "bearer"


class BodyLimitMiddleware:
    """Reads the whole body of a request within a size and a time limit, before the application sees it.

    uvicorn reads and discards the rest of a rejected body, so that the client receives the error.
    """

    def __init__(self, app: ASGIApp, body_seconds: float = BODY_SECONDS) -> None:
        self.app = app
        self.body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its body, or respond with 408, 413 or 415."""
        if scope["method"] != "POST" or scope["path"] not in PATHS_WITH_BODY:
            await self.app(scope, receive, send)
            return
        try:
            body = await self._read(Headers(scope=scope), receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is not None:
            await self.app(scope, _replaying(body, receive), send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """Return the body; None if the client disconnected."""
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the header Content-Type must be application/json", "wrong_content_type")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > LARGEST_BODY:
            raise _too_large()
        end = asyncio.get_running_loop().time() + self.body_seconds
        body = bytearray()
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - asyncio.get_running_loop().time()))
            except asyncio.TimeoutError:
                raise ApiError(408, "the body was not received in time", "body_timeout") from None
            if message["type"] != "http.request":
                return None
            body += message.get("body", b"")
            if len(body) > LARGEST_BODY:
                raise _too_large()
            if not message.get("more_body"):
                return bytes(body)


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {LARGEST_BODY // 2**20} MiB", "body_too_large")


def _replaying(body: bytes, receive: Receive) -> Receive:
    """Return a receive function that yields the body read, then the following messages."""
    is_given = False

    async def replay() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _name_of(host: str) -> str:
    """Return the name in a Host header, without port and brackets."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
