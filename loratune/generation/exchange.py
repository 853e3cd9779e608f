"""What goes into the engine and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loratune.data.conversation import Message
from loratune.model.sampling import Sampling

GREEDY = Sampling()


@dataclass(frozen=True)
class Question:
    """What is to be answered, and how."""

    messages: Sequence[Message] | str
    """A conversation that ends with a message of the user; a text is a prompt as it stands, without template."""
    sampling: Sampling = GREEDY
    adapter: str | None = None
    """Name of an adapter; None is the base alone."""
    use_adapter: bool = True
    """False leaves the adapter's weights off and keeps its prompt settings, for a comparison."""


@dataclass(frozen=True)
class Piece:
    """A part of an answer as it comes."""

    text: str = ""
    reasoning: str = ""
    """Of a thinking model, without its tags."""
    tokens: int = 0
    """Made so far, in all."""
    finish: str | None = None
    """Of the last piece: stop, length, cancelled or error."""
    error: BaseException | None = None


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    text: str
    reasoning: str
    prompt_tokens: int
    tokens: int
    """Made by the model, the end token included."""
    finish: str
    """stop or length."""
