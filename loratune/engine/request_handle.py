"""A submitted request: turns the generated tokens into chunks of the answer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from loratune.data.encoding.encoder import Encoder
from loratune.data.tools.call_form import CallStream
from loratune.engine.sequence import RunningSequence
from loratune.engine.text import Parts, TextStream
from loratune.engine.types import CALLED, Delta, GenerationRequest, joined


@dataclass(eq=False)
class RequestHandle:
    """A submitted request."""

    running: RunningSequence
    text: TextStream
    calls: CallStream | None
    """Parses tool calls in the text; None if no tools are available."""
    deliver: Callable[[Delta], None]
    is_cancelled: threading.Event = field(default_factory=threading.Event)
    has_called: bool = False
    """Whether a chunk contained tool calls."""
    ended: Callable[[], None] = lambda: None
    """Called when nothing is computed for the request any more."""

    @property
    def prompt_tokens(self) -> int:
        return len(self.running.prompt)

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string or the last allowed call was reached; later tokens are ignored."""
        return self.text.stopped or bool(self.calls and self.calls.is_done)

    def cancel(self) -> None:
        """Cancel the request; generation stops within one token. Thread-safe."""
        self.is_cancelled.set()

    def push(self, token: int) -> Delta:
        """Add a token, and return the content that is now certain."""
        return self._piece(self.text.push(token), is_last=False)

    def finish(self, before: Delta, finish: str, error: BaseException | None) -> Delta:
        """Return the last chunk: held back content and the finish reason.

        Args:
            before: content of the last token.
            finish: stop, length, cancelled or error.
            error: the exception, if any.
        """
        late = self._piece(self.text.finish(), is_last=True)
        ended = CALLED if finish == "stop" and self.has_called else finish
        return replace(joined(before, late), finish=ended, error=error)

    def _piece(self, parts: Parts, is_last: bool) -> Delta:
        text, calls = self.calls.push(parts.text, is_last) if self.calls else (parts.text, ())
        self.has_called = self.has_called or bool(calls)
        return Delta(text, parts.reasoning, len(self.running.tokens), calls=calls)


def make_handle(
    question: GenerationRequest, running: RunningSequence, encoder: Encoder, deliver: Callable[[Delta], None]
) -> RequestHandle:
    """Create the handle of a request.

    Args:
        question: the request.
        running: its sequence.
        encoder: the encoder that rendered its prompt.
        deliver: called with each chunk.
    """
    form = encoder.call_form if question.tools else None
    begun = "" if isinstance(question.messages, str) else encoder.answer_start_for(question.tools)
    marks = encoder.call_marks if form else None
    text = text_stream(encoder, running.prompt, question.sampling.stop, begun, marks)
    calls = CallStream(form, question.tools, question.most_calls) if form else None
    return RequestHandle(running, text, calls, deliver)


def text_stream(
    encoder: Encoder,
    prompt: list[int],
    stop: Sequence[str] = (),
    beginning: str | None = None,
    marks: Mapping[int, str] | None = None,
) -> TextStream:
    """Return a stream for the text of an answer.

    Args:
        encoder: the encoder that rendered the prompt.
        prompt: token ids.
        stop, marks: see `TextStream`.
        beginning: see `TextStream`; None is that of conversations without tools.
    """
    beginning = encoder.answer_start if beginning is None else beginning
    in_reasoning = _opens_reasoning(encoder, prompt)
    return TextStream(encoder.tokenizer, stop, in_reasoning, beginning, marks, encoder.streamed_form)


def gathering(index: int, ended: queue.SimpleQueue[tuple[int, list[Delta]]]) -> Callable[[Delta], None]:
    """Return a callback that collects an answer's chunks, and puts them into the queue when it is complete."""
    pieces: list[Delta] = []

    def add(piece: Delta) -> None:
        pieces.append(piece)
        if piece.finish:
            ended.put((index, pieces))

    return add


def _opens_reasoning(encoder: Encoder, prompt: list[int]) -> bool:
    """Return whether the prompt ends with the opening tag, as templates of models that always reason write it."""
    opening = encoder.reasoning_form.opening.strip()
    return bool(encoder.tokenizer.decode(prompt[-len(opening) :]).rstrip().endswith(opening))
