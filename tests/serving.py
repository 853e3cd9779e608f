"""A server inside the test's process, and an engine that says what it is told."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from loratune.engine.types import Delta, GenerationRequest
from loratune.errors import Exit, LoratuneError
from loratune.generation.server.addresses import Address
from loratune.generation.server.application import Limits, create_application
from loratune.generation.server.middleware import LOOPBACK_NAMES, Access
from loratune.generation.server.request_queue import Queue
from loratune.generation.server.running import make_server

API_KEY = "tell-nobody"


@dataclass
class Served:
    """A running server."""

    address: Address
    queue: Queue | None
    """None for a page without a model, which has no engine either."""
    engine: Any

    @property
    def port(self) -> int:
        return int(self.address.socket.getsockname()[1])

    @property
    def url(self) -> str:
        return self.address.url

    def request(
        self, path: str = "/v1/chat/completions", body: Any = None, method: str = "", **headers: str
    ) -> tuple[int, dict[str, str], str]:
        """Status, headers in small letters, and text; a header set to "" is left out."""
        import urllib.error
        import urllib.request

        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"Authorization": f"Bearer {API_KEY}"} | (
            {"Content-Type": "application/json"} if data is not None else {}
        )
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        call = urllib.request.Request(
            self.url + path, data, {name: value for name, value in sent.items() if value}, method=method or None
        )
        try:
            with urllib.request.urlopen(call, timeout=300) as response:
                return response.status, _small(response.headers), response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _small(error.headers), error.read().decode()

    def error(self, *arguments: Any, **headers: str) -> dict[str, Any]:
        """The error of a request that must fail, with its status."""
        status, _, text = self.request(*arguments, **headers)
        found = json.loads(text)["error"]
        assert set(found) == {"message", "type", "param", "code"}
        return {**found, "status": status}

    def connect(self, path: str, body: bytes = b"", *lines: str) -> socket.socket:
        """A connection on which a request has been sent."""
        opened = socket.create_connection(("127.0.0.1", self.port), timeout=120)
        head = [f"POST {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {API_KEY}",
                "Content-Type: application/json", *(lines or (f"Content-Length: {len(body)}",))]  # fmt: skip
        opened.sendall("\r\n".join([*head, "", ""]).encode() + body)
        return opened

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "did not come about"
            time.sleep(0.01)


def _small(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


@contextmanager
def served(
    engine: Any,
    *,
    slots: int = 32,
    waiting: int = 64,
    api_key: str | None = API_KEY,
    origins: frozenset[str] = frozenset(),
    **limits: Any,
) -> Iterator[Served]:
    """Serve an engine on a free port."""
    queue = Queue(engine, slots, waiting)
    access = Access(api_key, LOOPBACK_NAMES, origins=origins)
    app = create_application(engine, queue, access, Limits(slots=slots, waiting=waiting, **limits))
    try:
        with running(app) as address:
            yield Served(address, queue, engine)
    finally:
        queue.tokenizing.shutdown()


@contextmanager
def running(app: FastAPI) -> Iterator[Address]:
    """Run a server of an application on a free port, in a thread."""
    address, server = Address("127.0.0.1", 0), make_server(app)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([address.socket])))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield address
    finally:
        server.should_exit = True
        thread.join()
        address.socket.close()


@dataclass
class FakeHandle:
    prompt_tokens: int = 3
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.cancelled.set()


@dataclass
class FakeEngine:
    """Says `words`, one each time that `go` lets it; in a thread of its own for each question."""

    words: list[Delta] = field(default_factory=lambda: [Delta("yes", tokens=1), Delta(tokens=2, finish="stop")])
    base_name: str = "base"
    adapters: list[str] = field(default_factory=list)
    warnings: tuple[str, ...] = ()
    context_tokens: int = 100
    store: None = None
    questions: list[GenerationRequest] = field(default_factory=list)
    handles: list[FakeHandle] = field(default_factory=list)
    go: threading.Semaphore | None = None
    """One word for each release; None says all at once."""
    said: int = 0

    def submit(self, question: GenerationRequest, deliver: Callable[[Delta], None]) -> FakeHandle:
        if question.messages == "too long":
            raise LoratuneError("the prompt has 200 tokens and the model's context has 100; shorten it", Exit.USAGE)
        self.questions.append(question)
        handle = FakeHandle()
        self.handles.append(handle)
        threading.Thread(target=self._say, args=(handle, deliver), daemon=True).start()
        return handle

    def _say(self, handle: FakeHandle, deliver: Callable[[Delta], None]) -> None:
        for piece in self.words:
            while self.go is not None and not self.go.acquire(timeout=0.02):
                if handle.cancelled.is_set():
                    break
            if handle.cancelled.is_set():
                deliver(Delta(finish="cancelled"))
                return
            self.said += 1
            deliver(piece)


def chat(**fields: Any) -> dict[str, Any]:
    """The body of a question to the base."""
    return {"model": "base", "messages": [{"role": "user", "content": "Is it?"}], **fields}


def events(text: str) -> list[Any]:
    """The data of a stream's events; the last one, [DONE], as a text."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def benchmark_figures(place: Path, *words: str) -> dict[str, Any]:
    """Run `scripts/benchmark` with these words, and return its figures."""
    figures = place / "figures.json"
    command = [sys.executable, Path(__file__).parent.parent / "scripts" / "benchmark", *words, "--json", figures]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(figures.read_text())
    return found
