"""Submits requests to the engine, collects the answers as they stream, and cancels them on Ctrl-C."""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from loratune.engine.engine import Engine
from loratune.engine.request_handle import RequestHandle
from loratune.engine.types import Delta, GenerationRequest
from loratune.runtime import signals_to

_POLL_SECONDS = 0.05


@dataclass
class Reply:
    """An answer so far, and its timing."""

    text: str = ""
    reasoning: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    """Generated tokens, of reasoning and text."""
    finish: str = ""
    """Finish reason: `stop`, `length` or `cancelled`; empty while it is generated."""
    seconds: float = 0.0
    """Time from the request to the last token."""
    seconds_to_first: float | None = None
    """Time from the request to the first token (TTFT); None before it."""

    @property
    def tokens_per_second(self) -> float | None:
        """Generation speed after the first token; None for fewer than two tokens."""
        if self.seconds_to_first is None or self.tokens < 2:
            return None
        return (self.tokens - 1) / max(self.seconds - self.seconds_to_first, 1e-9)

    def take(self, piece: Delta, seconds: float) -> None:
        """Add a chunk that arrived `seconds` after the request."""
        self.text += piece.text
        self.reasoning += piece.reasoning
        self.tokens = max(self.tokens, piece.tokens)
        self.finish = piece.finish or ""
        self.seconds = seconds
        if self.seconds_to_first is None and self.tokens:
            self.seconds_to_first = seconds


class Screen(Protocol):
    """A display for answers while they are generated."""

    def show(self, place: int, piece: Delta) -> None:
        """Show more of the answer to the request with this index."""

    def wait(self) -> None:
        """Called while nothing arrives."""

    def close(self) -> None:
        """Called once at the end."""


def ask(
    engine: Engine, questions: Sequence[GenerationRequest], screen: Screen, is_stopped: Callable[[], bool]
) -> list[Reply]:
    """Answer all requests concurrently and show the answers as they stream.

    Args:
        engine: generates the answers.
        questions: the requests.
        screen: shows the answers; it is always closed.
        is_stopped: polled; once it returns True, the answers are cancelled.

    Returns:
        One answer per request.

    Raises:
        LoratuneError: a prompt does not fit into the context, or the engine failed.
    """
    arrived: queue.SimpleQueue[tuple[int, Delta]] = queue.SimpleQueue()
    replies = [Reply() for _ in questions]
    handles: list[RequestHandle] = []
    started = time.monotonic()
    try:
        for place, question in enumerate(questions):
            handles.append(engine.submit(question, partial(_deliver, arrived, place)))
            replies[place].prompt_tokens = handles[place].prompt_tokens
        while not all(reply.finish for reply in replies):
            if is_stopped():
                _cancel(handles)
            try:
                place, piece = arrived.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                screen.wait()
                continue
            replies[place].take(piece, time.monotonic() - started)
            if piece.error is not None:
                raise piece.error
            screen.show(place, piece)
    finally:
        _cancel(handles)
        screen.close()
    return replies


def _deliver(arrived: queue.SimpleQueue[tuple[int, Delta]], place: int, piece: Delta) -> None:
    arrived.put((place, piece))


def _cancel(handles: list[RequestHandle]) -> None:
    for handle in handles:
        handle.cancel()


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was pressed; a second press raises KeyboardInterrupt as usual."""
    pressed = threading.Event()

    def press(number: int, frame: object) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    with signals_to(press, [signal.SIGINT]):
        yield pressed.is_set
