"""`loratune serve` among bad requests, strangers, slow and vanishing clients, failures and signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import API_KEY, FakeEngine, FakeHandle, Served, chat, events, served

from loratune.engine.types import Delta, GenerationRequest
from loratune.errors import Exit, LoratuneError
from loratune.generation.server import connection, endpoints, middleware

CHAT = "/v1/chat/completions"
ENDLESS = [Delta(f"{n} ", tokens=n) for n in range(1, 5000)]


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    with served(FakeEngine()) as one:
        yield one


@pytest.fixture
def running(shared: Served) -> Served:
    """A server whose engine says yes, and has not been asked yet."""
    shared.engine.questions.clear()
    return shared


def user(content: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content, **more}]


# --- bodies ---

BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": user(None)}, "messages.0.content"),
    ({"messages": user(5)}, "messages.0.content"),
    ({"messages": user([])}, "messages.0.content"),
    ({"messages": user(["hi"])}, "messages.0.content.0"),
    (
        {"messages": user([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}])},
        "messages.0.content.0.type",
    ),
    ({"messages": user([{"type": "text", "text": "hi", "more": 1}])}, "messages.0.content.0.more"),
    ({"messages": user("hi", tool_calls=[{}])}, "messages.0.tool_calls"),
    ({"messages": user("hi", name=5)}, "messages.0.name"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role"),
    ({"messages": [{"role": "tool", "content": "hi"}]}, "messages.0.tool_call_id"),
    ({"messages": [{"role": "assistant", "content": "hi"}]}, "messages"),
    ({"messages": user("hi") * 1025}, "messages"),
    ({"model": ""}, "model"),
    ({"model": None}, "model"),
    ({"model": ["base"]}, "model"),
    ({"n": 10000}, "n"),
    ({"n": 0}, "n"),
    ({"max_tokens": 1e9}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": float("inf")}, "max_tokens"),
    ({"max_tokens": 10**9}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "9"}, "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": "warm"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": "7"}, "seed"),
    ({"seed": 0.5}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": [1]}, "stop.0"),
    ({"stop": "a" * 300}, "stop"),
    ({"stop": {}}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include": 1}}, "stream_options.include"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"user": 7}, "user"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_FIELDS)
def test_a_bad_field_is_named_and_nothing_reaches_the_model(
    running: Served, fields: dict[str, Any], param: str
) -> None:
    error = running.error(CHAT, chat(**fields))
    assert (error["status"], error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert error["message"].startswith(param)
    assert running.engine.questions == []


def test_an_unknown_role_is_told_with_all_roles(running: Served) -> None:
    error = running.error(CHAT, chat(messages=[{"role": "usr", "content": "hi"}]))
    assert error["message"] == "messages.0.role: must be system, developer, user, assistant or tool"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"temprature": 1.0}, "temprature: is not supported; did you mean temperature?"),
        ({"stream_options": {"include_usages": True}}, "include_usages: is not supported; did you mean include_usage?"),
        ({"typical_p": 0.5}, "typical_p: is not supported"),
        ({"model": "bsae"}, "no model is called bsae; did you mean base? there are "),
    ],
)
def test_a_misspelt_name_is_told_with_the_one_that_is_meant(running: Served, fields: dict[str, Any], told: str) -> None:
    error = running.error(CHAT, chat(**fields))
    assert told in error["message"]
    assert ("did you mean" in error["message"]) == ("did you mean" in told)
    assert error["code"] == ("model_not_found" if "model" in fields else "extra_forbidden")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "base", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"model": "base", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "base", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "base", "\\ud800": 1, "messages": [{"role": "user", "content": "hi"}]}',
        json.dumps(chat()).encode("utf-16")[:-1],
    ],
)
def test_a_body_that_is_no_request_is_refused_in_openai_s_form(running: Served, body: bytes) -> None:
    error = running.error(CHAT, body)
    assert (error["status"], error["type"]) == (400, "invalid_request_error")
    assert running.engine.questions == []
    assert running.request(body=chat())[0] == 200


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""]
)
def test_only_json_is_read(running: Served, kind: str) -> None:
    body = json.dumps(chat()).encode()
    with running.connect(CHAT, body, f"Content-Length: {len(body)}", "X-Test: 1") as opened:
        assert opened.recv(100).startswith(b"HTTP/1.1 200")
    connection_lines = [f"Content-Type: {kind}"] if kind else []
    head = ["POST " + CHAT + " HTTP/1.1", "Host: localhost", f"Authorization: Bearer {API_KEY}", *connection_lines,
            f"Content-Length: {len(body)}", "", ""]  # fmt: skip
    with socket.create_connection(("127.0.0.1", running.port), timeout=120) as opened:
        opened.sendall("\r\n".join(head).encode() + body)
        assert opened.recv(100).startswith(b"HTTP/1.1 415")
    assert len(running.engine.questions) == 1


def test_a_huge_body_is_refused_by_its_length_and_by_its_pieces(running: Served) -> None:
    import psutil

    large = b" " * 65536
    before = psutil.Process().memory_info().rss
    for _ in range(3):
        with running.connect(CHAT, b"", f"Content-Length: {512 * len(large)}") as opened:
            answer = opened.recv(100)  # before anything of the body is sent
            assert answer.startswith(b"HTTP/1.1 413")
        with running.connect(CHAT, b"", "Transfer-Encoding: chunked") as opened:
            with contextlib.suppress(OSError):  # the server may have had enough
                for _ in range(512):
                    opened.sendall(b"10000\r\n" + large + b"\r\n")
            assert opened.recv(100).startswith(b"HTTP/1.1 413")
    assert psutil.Process().memory_info().rss - before < 24e6
    assert running.engine.questions == []


def test_a_body_that_does_not_come_is_waited_for_only_so_long() -> None:
    begun = (CHAT, b'{"mo', "Content-Length: 500")
    with served(FakeEngine(), body_seconds=0.3) as running:
        answer = rest_of(running.connect(*begun))  # the connection is closed
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"body_timeout"' in answer


@pytest.mark.parametrize("begun", [b"", b"POST /v1/chat", b"POST /v1/chat/completions HTTP/1.1\r\nX: 1\r\n"])
def test_a_request_that_does_not_come_is_waited_for_only_so_long(
    running: Served, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    monkeypatch.setattr(connection, "REQUEST_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", running.port), timeout=120) as opened:
        opened.sendall(begun)
        with contextlib.suppress(ConnectionResetError):
            assert opened.recv(100) == b""


def test_there_are_only_so_many_connections(running: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "MOST_CONNECTIONS", 3)
    with contextlib.ExitStack() as stack:
        address = ("127.0.0.1", running.port)
        opened = [stack.enter_context(socket.create_connection(address, timeout=120)) for _ in range(4)]
        with contextlib.suppress(ConnectionResetError):
            assert opened[3].recv(100) == b""
    running.wait_until(lambda: running.request("/health")[0] == 200)


def test_expect_is_answered_before_a_body_that_is_too_large_comes(running: Served) -> None:
    with running.connect(CHAT, b"", "Content-Length: 99999999", "Expect: 100-continue") as opened:
        assert opened.recv(100).startswith(b"HTTP/1.1 413")


# --- strangers ---


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer ", "Bearer wrong", f"Bearer {API_KEY}x", f"Bearer {API_KEY[:-1]}",
              f"Basic {API_KEY}", API_KEY, "Bearer schl\xfcssel"]
)  # fmt: skip
def test_without_the_api_key_there_is_nothing(running: Served, given: str) -> None:
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
        status, headers, text = running.request(path, Authorization=given)
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
        assert json.loads(text)["error"]["code"] == "invalid_api_key"
    assert running.error(CHAT, chat(), Authorization=given)["status"] == 401
    assert running.engine.questions == []


def test_the_api_key_is_compared_in_constant_time(running: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def spy(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr(middleware.hmac, "compare_digest", spy)
    for key in ("x", "x" * 5000, API_KEY):
        running.request("/v1/models", Authorization=f"Bearer {key}")
    assert len(compared) == 3
    assert len({length for pair in compared for length in pair}) == 1


def test_the_scheme_s_case_and_blanks_do_not_matter(running: Served) -> None:
    assert running.request("/v1/models", Authorization=f"bearer   {API_KEY} ")[0] == 200


def test_the_page_and_health_need_no_api_key(running: Served) -> None:
    for path in ("/", "/health", "/page/main.js"):
        assert running.request(path, Authorization="")[0] == 200


def test_without_api_key_everybody_here_may_ask() -> None:
    with served(FakeEngine(), api_key=None) as running:
        assert running.request(body=chat(), Authorization="")[0] == 200
        assert running.error(CHAT, chat(), Authorization="", Origin="http://evil.example")["status"] == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil", "", "["]
)
def test_another_host_is_refused_whatever_the_token(running: Served, host: str) -> None:
    with socket.create_connection(("127.0.0.1", running.port), timeout=120) as opened:
        opened.sendall(f"GET /health HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {API_KEY}\r\n\r\n".encode())
        assert opened.recv(4096).startswith(b"HTTP/1.1 403")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:99", "[::1]:5", "localhost."])
def test_this_machine_s_own_names_are_known(running: Served, host: str) -> None:
    assert running.request("/v1/models", Host=host)[0] == 200


def test_no_page_of_another_origin_gets_in_unless_it_is_allowed() -> None:
    friend = "http://localhost:3000"
    with served(FakeEngine(), origins=frozenset({friend})) as running:
        for origin in ("http://evil.example", "null", "http://localhost:3001", f"{friend}.evil.example"):
            status, headers, _ = running.request(CHAT, chat(), Origin=origin)
            assert status == 403
            assert "access-control-allow-origin" not in headers
        status, headers, _ = running.request(CHAT, chat(), Origin=friend)
        assert (status, headers["access-control-allow-origin"]) == (200, friend)
        asks = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization"}
        status, headers, _ = running.request(CHAT, method="OPTIONS", Authorization="", Origin=friend, **asks)
        assert status == 200
        assert "authorization" in headers["access-control-allow-headers"].lower()
        status, headers, _ = running.request(CHAT, chat(), Origin=friend, Authorization="")
        assert (status, headers["access-control-allow-origin"]) == (401, friend)


def test_without_allowed_origins_there_are_no_cors_headers(running: Served) -> None:
    own = running.url
    for origin, expected in ((own, 200), ("http://evil.example", 403)):
        status, headers, _ = running.request(CHAT, chat(), Origin=origin)
        assert status == expected
        assert not [name for name in headers if name.startswith("access-control")]
    assert running.request(CHAT, method="OPTIONS", Authorization="", Origin=own)[0] == 401


@pytest.mark.parametrize(
    "path",
    ["/page/../page_files.py", "/page/..%2fpage_files.py", "/page/%2e%2e/page_files.py", "/page//etc/passwd",
     "/page/", "/page/.", "/page/index.html%00", "/page/....//running.py", "/page/..\\running.py"],
)  # fmt: skip
def test_only_the_page_s_own_files_are_served(running: Served, path: str) -> None:
    with socket.create_connection(("127.0.0.1", running.port), timeout=120) as opened:
        opened.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: opened.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 404")
    assert b"import" not in answer


def test_the_page_s_files_have_their_types_and_a_strict_policy(running: Served) -> None:
    folder = Path(endpoints.__file__).parent / "page"
    kinds = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
    for path in [running.url + "/", *sorted(folder.iterdir())]:
        name = "/" if isinstance(path, str) else f"/page/{path.name}"
        _, headers, text = running.request(name, Authorization="")
        file = folder / "index.html" if isinstance(path, str) else path
        assert text == file.read_text(encoding="utf-8")
        assert headers["content-type"].partition(";")[0] == kinds[file.suffix]
        policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


# --- many at once ---


def ask_in_background(running: Served, count: int, **fields: Any) -> tuple[list[threading.Thread], list[Any]]:
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda: results.append(running.request(body=chat(**fields)))) for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    return threads, results


def test_what_does_not_fit_into_the_queue_is_told_when_to_come_back() -> None:
    engine = FakeEngine(go=threading.Semaphore(0))
    with served(engine, slots=2, waiting=1) as running:
        threads, results = ask_in_background(running, 3)
        running.wait_until(lambda: len(engine.questions) == 3)
        status, headers, text = running.request(body=chat())
        assert (status, json.loads(text)["error"]["code"]) == (429, "queue_full")
        assert int(headers["retry-after"]) >= 1
        assert "loratune_waiting 1.0" in running.request("/metrics")[2]
        assert len(engine.questions) == 3
        engine.go.release(100)
        for thread in threads:
            thread.join()
        assert [status for status, _, _ in results] == [200] * 3
        assert running.request(body=chat())[0] == 200


def test_places_come_back_however_a_request_ends() -> None:
    with served(FakeEngine(), slots=1, waiting=0) as running:
        for fields in ({"messages": []}, {"model": "x"}, {"stream": True}, {}):
            for _ in range(3):
                assert running.request(body=chat(**fields))[0] != 429
        for _ in range(3):
            error = running.error("/v1/completions", {"model": "base", "prompt": "too long"})
            assert error["code"] == "context_length_exceeded"
        running.wait_until(lambda: not running.queue.replies)


@pytest.mark.parametrize("stream", [True, False])
def test_generation_ends_within_a_token_when_the_client_leaves(stream: bool) -> None:
    engine = FakeEngine(ENDLESS, go=threading.Semaphore(0))
    with served(engine, slots=1, waiting=0) as running:
        opened = running.connect(CHAT, json.dumps(chat(stream=stream)).encode())
        running.wait_until(lambda: bool(engine.handles))
        engine.go.release(3)
        running.wait_until(lambda: engine.said == 3)
        if stream:
            assert b"200 OK" in opened.recv(4096)
        opened.close()
        running.wait_until(engine.handles[0].cancelled.is_set)
        assert engine.said == 3
        running.wait_until(lambda: not running.queue.replies)
        engine.words, engine.go = [Delta("yes", tokens=1, finish="stop")], None
        assert running.request(body=chat())[0] == 200


def test_a_client_that_leaves_while_its_question_is_handed_in_costs_no_generation() -> None:
    engine = FakeEngine(ENDLESS, go=threading.Semaphore(0))
    held = threading.Event()
    hand_in = engine.submit
    engine.submit = lambda *arguments: held.wait(20) and hand_in(*arguments)  # type: ignore[method-assign]
    with served(engine) as running:
        running.connect(CHAT, json.dumps(chat(stream=True)).encode()).close()
        running.wait_until(lambda: bool(running.queue.replies))
        held.set()
        running.wait_until(lambda: bool(engine.handles) and engine.handles[0].cancelled.is_set())
        running.wait_until(lambda: not running.queue.replies)
    assert engine.said == 0


def test_a_client_that_does_not_read_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STUCK_SECONDS", 0.3)
    long = "x" * 100_000
    engine = FakeEngine([Delta(long, tokens=n) for n in range(1, 1000)], go=threading.Semaphore(0))
    with served(engine) as running:
        opened = running.connect(CHAT, json.dumps(chat(stream=True)).encode())
        for _ in range(100):  # more than the buffers of both sides take
            engine.go.release()
            time.sleep(0.01)
        running.wait_until(engine.handles[0].cancelled.is_set)
        running.wait_until(lambda: not running.queue.replies)
        assert engine.said <= 100
        opened.close()


def test_no_two_questions_are_tokenized_at_once() -> None:
    engine, at_once, most = FakeEngine(), 0, 0
    hand_in = engine.submit

    def slow(*arguments: Any) -> Any:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.02)
        at_once -= 1
        return hand_in(*arguments)

    engine.submit = slow  # type: ignore[method-assign]
    with served(engine) as running:
        threads, results = ask_in_background(running, 8)
        for thread in threads:
            thread.join()
    assert [status for status, _, _ in results] == [200] * 8
    assert most == 1


# --- failures ---


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (LoratuneError("out of memory during generation", Exit.IO), 503, "out_of_memory"),
        (ZeroDivisionError("a bug"), 500, None),
    ],
)
def test_a_failure_before_the_end_is_no_answer(
    error: BaseException, status: int, code: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine([Delta("half", tokens=1), Delta(tokens=1, finish="error", error=error)])
    with served(engine) as running:
        found = running.error(CHAT, chat())
        assert (found["status"], found["code"], found["type"]) == (status, code, "server_error")
        assert "ZeroDivision" not in found["message"]
        running.wait_until(lambda: not running.queue.replies)
    assert ("ZeroDivisionError" in capsys.readouterr().err) == (status == 500)


def test_a_failure_in_a_stream_is_told_and_is_no_end() -> None:
    error = LoratuneError("out of memory during generation", Exit.IO)
    words = [Delta("half ", tokens=1), Delta("an answer", tokens=2), Delta(tokens=2, finish="error", error=error)]
    engine = FakeEngine(words, go=threading.Semaphore(0))
    with served(engine) as running:
        opened = running.connect(CHAT, json.dumps(chat(stream=True)).encode())
        seen = b""
        for wanted in (b"half", b"an answer", b'"error"'):
            engine.go.release()
            while wanted not in seen:
                part = opened.recv(4096)
                assert part
                seen += part
        while not seen.endswith(b"0\r\n\r\n"):
            seen += opened.recv(4096)
        opened.close()
        assert b"[DONE]" not in seen
        assert b"out of memory" in seen
        assert b'"finish_reason": "' not in seen


def test_openai_s_client_raises_what_a_stream_tells() -> None:
    import openai

    error = LoratuneError("out of memory during generation", Exit.IO)
    engine = FakeEngine([Delta("half", tokens=1), Delta(tokens=1, finish="error", error=error)])
    with served(engine) as running, openai.OpenAI(base_url=f"{running.url}/v1", api_key=API_KEY) as client:
        stream = client.chat.completions.create(model="base", messages=user("hi"), stream=True)
        with pytest.raises(openai.APIError, match="out of memory"):
            list(stream)


class AtOnce(FakeEngine):
    """Has said everything before anybody looks."""

    def submit(self, question: GenerationRequest, deliver: Callable[[Delta], None]) -> FakeHandle:
        for piece in self.words:
            deliver(piece)
        return FakeHandle()


@pytest.mark.parametrize("finish", ["error", "cancelled"])
def test_text_that_came_with_a_failure_is_told_before_it(finish: str) -> None:
    error = LoratuneError("out of memory during generation", Exit.IO) if finish == "error" else None
    words = [Delta("half ", tokens=1), Delta("an answer", tokens=2), Delta(tokens=2, finish=finish, error=error)]
    with served(AtOnce(words)) as running:
        text = running.request(CHAT, chat(stream=True))[2]
        *before, failure = events(text)
        assert "".join(one["choices"][0]["delta"].get("content", "") for one in before) == "half an answer"
        assert failure["error"]["message"]


def test_a_bug_in_a_stream_breaks_the_connection(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine([Delta("half", tokens=1), Delta(tokens=1, finish="error", error=ZeroDivisionError("a bug"))])
    with served(engine) as running:
        with running.connect(CHAT, json.dumps(chat(stream=True)).encode()) as opened:
            seen = b"".join(iter(lambda: opened.recv(65536), b""))
        assert b"[DONE]" not in seen
        assert not seen.endswith(b"0\r\n\r\n")  # what says that a response is whole
        running.wait_until(lambda: not running.queue.replies)
        assert running.request("/health")[0] == 200
    assert "ZeroDivisionError: a bug" in capsys.readouterr().err


def test_a_quiet_stream_is_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "QUIET_SECONDS", 0.1)
    engine = FakeEngine(go=threading.Semaphore(0))
    with served(engine) as running:
        with running.connect(CHAT, json.dumps(chat(stream=True)).encode()) as opened:
            seen = b""
            while seen.count(b"\n: ") < 2:
                seen += opened.recv(4096)
            engine.go.release(5)
            while b"[DONE]" not in seen:
                seen += opened.recv(4096)
        assert len(events(seen.decode())) > 2


# --- signals ---

NURSERY = """
import json, os, signal, sys, threading, time
sys.path.insert(0, {tests!r})
from serving import *
from loratune.errors import Interrupted
from loratune.generation.server.running import run

def serve(pace, grace, ignores_hangup):
    # Whoever runs the tests in the background has them start with signals ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_IGN if ignores_hangup else signal.SIG_DFL)
    engine = FakeEngine([Delta("a ", tokens=n) for n in range(1, 40)] + [Delta(tokens=40, finish="stop")])
    engine.go, engine.close = threading.Semaphore(0), lambda: None
    def let_go():
        while True:
            engine.go.release()
            time.sleep(pace)
    threading.Thread(target=let_go, daemon=True).start()
    address = Address("127.0.0.1", 0)
    print(os.getpid(), address.socket.getsockname()[1], flush=True)
    try:
        run(engine, address, Access(API_KEY), Limits(grace_seconds=grace))
    except Interrupted as stop:
        os._exit(128 + stop.signal_number)

for line in sys.stdin:
    child = os.fork()
    if not child:
        serve(*json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class There:
    """A server in a process of its own."""

    def __init__(self, nursery: subprocess.Popen[str], *settings: Any) -> None:
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        self.lines = nursery.stdout
        nursery.stdin.write(json.dumps(settings) + "\n")
        nursery.stdin.flush()
        self.pid, port = map(int, self.lines.readline().split())
        self.address = self
        self.url = f"http://127.0.0.1:{port}"
        self.socket = self
        self.getsockname = lambda: ("127.0.0.1", port)
        self.served = Served(self, None, None)  # type: ignore[arg-type]
        self.request, self.connect = self.served.request, self.served.connect
        self.served.wait_until(self.is_up)

    def is_up(self) -> bool:
        with contextlib.suppress(OSError):
            return self.request("/health")[0] == 200
        return False

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def exit_code(self) -> int:
        return int(self.lines.readline())


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen[str]]:
    """A process that has imported everything and forks one server after the other."""
    script = NURSERY.format(tests=str(Path(__file__).parent))
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def begin_stream(there: There) -> socket.socket:
    """A stream whose first word has come."""
    opened = there.connect(CHAT, json.dumps(chat(stream=True)).encode())
    seen = b""
    while b'"a "' not in seen:
        seen += opened.recv(4096)
    return opened


def rest_of(opened: socket.socket) -> bytes:
    with opened:
        return b"".join(iter(lambda: opened.recv(65536), b""))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_lets_running_answers_finish_and_takes_no_more(
    nursery: subprocess.Popen[str], number: int, code: int
) -> None:
    there = There(nursery, 0.04, 20, False)
    opened = begin_stream(there)
    there.send(number)
    there.served.wait_until(lambda: there.request("/health")[0] == 503)
    assert json.loads(there.request("/health")[2]) == {"status": "stopping"}
    status, headers, text = there.request(body=chat())
    assert (status, json.loads(text)["error"]["code"]) == (503, "stopping")
    assert "retry-after" in headers
    assert b"[DONE]" in rest_of(opened)
    assert there.exit_code() == code


@pytest.mark.parametrize("stream", [True, False])
def test_answers_that_take_too_long_are_told_that_the_server_stops(
    nursery: subprocess.Popen[str], stream: bool
) -> None:
    there = There(nursery, 0.5, 0.3, False)
    opened = begin_stream(there) if stream else there.connect(CHAT, json.dumps(chat()).encode())
    while "loratune_running 1.0" not in there.request("/metrics")[2]:
        time.sleep(0.01)
    there.send(signal.SIGTERM)
    seen = rest_of(opened)
    assert b'"stopping"' in seen
    assert b"[DONE]" not in seen
    assert seen.startswith(b"HTTP/1.1 503") or stream
    assert there.exit_code() == 143


def test_a_second_signal_ends_at_once(nursery: subprocess.Popen[str]) -> None:
    there = There(nursery, 0.5, 600, False)
    opened = begin_stream(there)
    there.send(signal.SIGTERM)
    there.served.wait_until(lambda: there.request("/health")[0] == 503)
    there.send(signal.SIGINT)
    assert there.exit_code() == 130
    opened.close()


def test_a_hangup_that_is_ignored_stays_so(nursery: subprocess.Popen[str]) -> None:
    there = There(nursery, 0.001, 5, True)
    there.send(signal.SIGHUP)
    assert there.request(body=chat())[0] == 200
    there.send(signal.SIGTERM)
    assert there.exit_code() == 143
