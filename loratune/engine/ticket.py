"""A question on its way through the engine, and how its tokens become pieces of an answer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from loratune.data.encoding.encoder import Encoder
from loratune.data.tools.call_form import CallStream
from loratune.engine.exchange import CALLED, Piece, Question, joined
from loratune.engine.running import Running
from loratune.engine.text import OPENING, Parts, TextStream


@dataclass(eq=False)
class Ticket:
    """A question that was handed in."""

    running: Running
    text: TextStream
    calls: CallStream | None
    """Finds calls of tools in the text; None does not look for any."""
    deliver: Callable[[Piece], None]
    is_cancelled: threading.Event = field(default_factory=threading.Event)
    has_called: bool = False
    """Whether a piece has held calls."""

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.running.prompt)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop text or the last call has come; nothing after it counts."""
        return self.text.stopped or bool(self.calls and self.calls.is_done)

    def cancel(self) -> None:
        """End the answer within a token; from any thread."""
        self.is_cancelled.set()

    def push(self, token: int) -> Piece:
        """What has become certain with one more token."""
        return self._piece(self.text.push(token), is_last=False)

    def finish(self, before: Piece, finish: str, error: BaseException | None) -> Piece:
        """The last piece: what was held back, and how the answer has ended.

        Args:
            before: what came with the last token.
            finish: stop, length, cancelled or error.
            error: if there was one.
        """
        late = self._piece(self.text.finish(), is_last=True)
        ended = CALLED if finish == "stop" and self.has_called else finish
        return replace(joined(before, late), finish=ended, error=error)

    def _piece(self, parts: Parts, is_last: bool) -> Piece:
        text, calls = self.calls.push(parts.text, is_last) if self.calls else (parts.text, ())
        self.has_called = self.has_called or bool(calls)
        return Piece(text, parts.reasoning, len(self.running.tokens), calls=calls)


def make_ticket(question: Question, running: Running, encoder: Encoder, deliver: Callable[[Piece], None]) -> Ticket:
    """A ticket for a question.

    Args:
        question: what is asked.
        running: its prompt on the way through the model.
        encoder: has rendered the prompt.
        deliver: gets the pieces.
    """
    begun = "" if isinstance(question.messages, str) else encoder.answer_start_for(question.tools)
    form = encoder.call_form if question.tools else None
    marks = encoder.call_marks if form else None
    in_reasoning = _opens_reasoning(encoder, running.prompt)
    text = TextStream(encoder.tokenizer, question.sampling.stop, in_reasoning, begun, marks)
    calls = CallStream(form, question.tools, question.most_calls) if form else None
    return Ticket(running, text, calls, deliver)


def gathering(index: int, ended: queue.SimpleQueue[tuple[int, list[Piece]]]) -> Callable[[Piece], None]:
    """What collects the pieces of one answer and passes them on once it is whole."""
    pieces: list[Piece] = []

    def add(piece: Piece) -> None:
        pieces.append(piece)
        if piece.finish:
            ended.put((index, pieces))

    return add


def _opens_reasoning(encoder: Encoder, prompt: list[int]) -> bool:
    """Whether the template has written the tag itself, as those of models that always reason do."""
    return bool(encoder.tokenizer.decode(prompt[-4:]).rstrip().endswith(OPENING))
