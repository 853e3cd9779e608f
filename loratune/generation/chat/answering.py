"""Ask an engine some questions at once, follow the answers as they grow, and end them at Ctrl-C."""

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
from loratune.engine.exchange import Piece, Question
from loratune.engine.ticket import Ticket
from loratune.runtime import signals_to

_POLL_SECONDS = 0.05


@dataclass
class Reply:
    """An answer as far as it has come, and how long it took."""

    text: str = ""
    reasoning: str = ""
    prompt_tokens: int = 0
    tokens: int = 0
    """New ones, of reasoning and text."""
    finish: str = ""
    """Why it ended: `stop`, `length` or `cancelled`; empty while it grows."""
    seconds: float = 0.0
    """From the question to the last token."""
    seconds_to_first: float | None = None
    """From the question to the first token; None if none came."""

    @property
    def tokens_per_second(self) -> float | None:
        """How fast tokens came after the first; None where there was no second one."""
        if self.seconds_to_first is None or self.tokens < 2:
            return None
        return (self.tokens - 1) / max(self.seconds - self.seconds_to_first, 1e-9)

    def take(self, piece: Piece, seconds: float) -> None:
        """Add a piece that came so long after the question."""
        self.text += piece.text
        self.reasoning += piece.reasoning
        self.tokens = max(self.tokens, piece.tokens)
        self.finish = piece.finish or ""
        self.seconds = seconds
        if self.seconds_to_first is None and self.tokens:
            self.seconds_to_first = seconds


class Screen(Protocol):
    """Where answers appear while they grow."""

    def show(self, place: int, piece: Piece) -> None:
        """Show more of the answer to the question with this number."""

    def wait(self) -> None:
        """Nothing has come for a moment."""

    def close(self) -> None:
        """Nothing more comes."""


def ask(engine: Engine, questions: Sequence[Question], screen: Screen, is_stopped: Callable[[], bool]) -> list[Reply]:
    """Answer all questions together and show the answers as they come.

    Args:
        engine: answers.
        questions: answered at the same time.
        screen: shows; it is closed in any case.
        is_stopped: asked again and again; once it says True, the answers end where they are.

    Returns:
        An answer to each question.

    Raises:
        LoratuneError: a prompt does not fit into the context, or the engine has failed.
    """
    arrived: queue.SimpleQueue[tuple[int, Piece]] = queue.SimpleQueue()
    replies = [Reply() for _ in questions]
    tickets: list[Ticket] = []
    started = time.monotonic()
    try:
        for place, question in enumerate(questions):
            tickets.append(engine.submit(question, partial(_deliver, arrived, place)))
            replies[place].prompt_tokens = tickets[place].prompt_tokens
        while not all(reply.finish for reply in replies):
            if is_stopped():
                _cancel(tickets)
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
        _cancel(tickets)
        screen.close()
    return replies


def _deliver(arrived: queue.SimpleQueue[tuple[int, Piece]], place: int, piece: Piece) -> None:
    arrived.put((place, piece))


def _cancel(tickets: list[Ticket]) -> None:
    for ticket in tickets:
        ticket.cancel()


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C into a question that a loop can ask; pressed a second time it raises KeyboardInterrupt as usual."""
    pressed = threading.Event()

    def press(number: int, frame: object) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    with signals_to(press, [signal.SIGINT]):
        yield pressed.is_set
