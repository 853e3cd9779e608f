"""What goes into the engine and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loratune.data.formats.conversation import Message
from loratune.data.tools.call_shapes import Call
from loratune.engine.sampling import Sampling

GREEDY = Sampling()
CALLED = "tool_calls"
"""How an answer ends that calls tools."""


@dataclass(frozen=True)
class Question:
    """What is to be answered, and how."""

    messages: Sequence[Message] | str
    """A conversation that ends with a message of user or tool; a text is a prompt as it stands, without template."""
    sampling: Sampling = GREEDY
    adapter: str | None = None
    """Name of an adapter; None is the base alone."""
    use_adapter: bool = True
    """False leaves the adapter's weights off and keeps its prompt settings, for a comparison."""
    tools: Sequence[dict[str, Any]] = ()
    """What may be called; without any, calls are not looked for."""
    most_calls: int | None = None
    """The answer ends after so many calls; None takes all."""


@dataclass(frozen=True)
class Piece:
    """A part of an answer as it comes."""

    text: str = ""
    reasoning: str = ""
    """Of a thinking model, without its tags."""
    tokens: int = 0
    """Made so far, in all."""
    finish: str | None = None
    """Of the last piece: stop, tool_calls, length, cancelled or error."""
    error: BaseException | None = None
    calls: tuple[Call, ...] = ()
    """Of tools; they are no part of the text."""

    @property
    def has_come(self) -> bool:
        """Whether it says something."""
        return bool(self.text or self.reasoning or self.calls)


NOTHING = Piece()


def joined(*pieces: Piece) -> Piece:
    """Pieces that follow each other as one; how far it has come, and its end, are those of the last."""
    last = pieces[-1]
    text, reasoning = ("".join(getattr(piece, kind) for piece in pieces) for kind in ("text", "reasoning"))
    calls = tuple(call for piece in pieces for call in piece.calls)
    return Piece(text, reasoning, last.tokens, last.finish, last.error, calls)


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    text: str
    reasoning: str
    prompt_tokens: int
    tokens: int
    """Made by the model, the end token included."""
    finish: str
    """stop, tool_calls or length."""
    calls: tuple[Call, ...] = ()
