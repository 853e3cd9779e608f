"""A browser for tests of the chat page, and an engine whose answers a test writes."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from serving import API_KEY, FakeHandle, Served

from loratune.engine.types import Delta, GenerationRequest

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
KEY_ADDRESS = f"/#api_key={API_KEY}"


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless Chromium; the test is skipped where there is none, and fails where CI is set."""
    path = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _give_up("the package playwright is not installed")
    if path is None:
        _give_up(f"no Chromium was found under the names {', '.join(CHROMIUM_NAMES)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


def _give_up(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(f"{reason}, and CI is set")
    pytest.skip(reason)


@contextmanager
def opened(
    browser: Any, served: Served, address: str = KEY_ADDRESS, expected: str = "", **options: Any
) -> Iterator[Any]:
    """The chat page in a window of its own; whatever the browser complains of fails the test.

    Args:
        browser: as `chromium` gives it.
        served: the server.
        address: path and fragment.
        expected: part of the complaints that are no fault, as of a response that is an error on purpose.
        options: of the window: viewport, locale, color_scheme and so on.
    """
    complaints: list[str] = []
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, "locale": "en-US", **options})
    page = context.new_page()
    page.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(served.url + address)
    try:
        yield page
        unexpected = [each for each in complaints if not expected or expected not in each]
        assert not unexpected, unexpected
    finally:
        context.close()


def ask(page: Any, question: str, wait: bool = True) -> None:
    """Type a question and send it; wait until every answer is there."""
    page.wait_for_selector("#model-a option", state="attached")
    count = page.locator(".turn").count()
    page.fill("#message", question)
    page.press("#message", "Enter")
    if wait:
        page.locator(".turn").nth(count).wait_for()
        page.wait_for_selector("body:not(.is-running)")


def wait_until(page: Any, expression: str, seconds: float = 120) -> None:
    """Wait until JavaScript says so; playwright's own way needs eval, which the page forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"did not come about: {expression}"
        time.sleep(0.02)


def text_of(page: Any, selector: str) -> list[str]:
    """What stands in all elements, as the reader sees it."""
    return [text.strip() for text in page.locator(selector).all_inner_texts()]


def pieces(text: str, reasoning: str = "", finish: str = "stop", size: int = 5) -> list[Delta]:
    """An answer cut up as a model would give it."""
    thinking = [Delta(reasoning=reasoning[at : at + size]) for at in range(0, len(reasoning), size)]
    saying = [Delta(text[at : at + size]) for at in range(0, len(text), size)]
    counted = [Delta(each.text, each.reasoning, place) for place, each in enumerate(thinking + saying, 1)]
    return [*counted, Delta(tokens=len(counted) + 1, finish=finish)]


@dataclass
class Scripted:
    """Answers each question with what `say` gives for it.

    With `go`, every piece waits until it is released once.
    """

    say: Callable[[GenerationRequest], list[Delta]] = lambda question: pieces(
        f"You said: {question.messages[-1]['content']}"
    )
    base_name: str = "Qwen/base"
    adapters: list[str] = field(default_factory=lambda: ["robin", "wren"])
    context_tokens: int = 1000
    store: None = None
    questions: list[GenerationRequest] = field(default_factory=list)
    handles: list[FakeHandle] = field(default_factory=list)
    go: threading.Semaphore | None = None

    def submit(self, question: GenerationRequest, deliver: Callable[[Delta], None]) -> FakeHandle:
        """Answer in a thread of its own."""
        self.questions.append(question)
        self.handles.append(FakeHandle())
        arguments = (question, self.handles[-1], deliver, self.go)
        threading.Thread(target=self._deliver, args=arguments, daemon=True).start()
        return self.handles[-1]

    def _deliver(
        self,
        question: GenerationRequest,
        handle: FakeHandle,
        deliver: Callable[[Delta], None],
        go: threading.Semaphore | None,
    ) -> None:
        for piece in self.say(question):
            while go and not handle.cancelled.is_set() and not go.acquire(timeout=0.02):
                pass
            if handle.cancelled.is_set():
                deliver(Delta(finish="cancelled"))
                return
            deliver(piece)
