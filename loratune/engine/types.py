"""The engine's data types: requests, streamed chunks, answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from loratune.data.formats.conversation import Message
from loratune.data.tools.call_shapes import Call
from loratune.engine.sampling import Sampling

GREEDY = Sampling()
CALLED = "tool_calls"
"""Finish reason of an answer with tool calls."""


@dataclass(frozen=True)
class GenerationRequest:
    """A generation request."""

    messages: Sequence[Message] | str
    """A conversation that ends with a message of user or tool; or a string, which is used without a template."""
    sampling: Sampling = GREEDY
    adapter: str | None = None
    """Name of an adapter; None for the base alone."""
    use_adapter: bool = True
    """False disables the adapter's weights but keeps its prompt settings, for comparison."""
    tools: Sequence[dict[str, Any]] = ()
    """Available tools; without any, tool calls are not parsed."""
    most_calls: int | None = None
    """The answer ends after this many calls; None for no limit."""


@dataclass(frozen=True)
class Delta:
    """A chunk of a streamed answer."""

    text: str = ""
    reasoning: str = ""
    """Reasoning, without its tags."""
    tokens: int = 0
    """Total number of tokens generated so far."""
    finish: str | None = None
    """Finish reason, in the last chunk: stop, tool_calls, length, cancelled or error."""
    error: BaseException | None = None
    calls: tuple[Call, ...] = ()
    """Tool calls; they are not part of the text."""

    @property
    def has_come(self) -> bool:
        """Whether the chunk has any content."""
        return bool(self.text or self.reasoning or self.calls)


NOTHING = Delta()


def joined(*pieces: Delta) -> Delta:
    """Concatenate consecutive chunks; token count and finish reason are those of the last."""
    last = pieces[-1]
    text, reasoning = ("".join(getattr(piece, kind) for piece in pieces) for kind in ("text", "reasoning"))
    calls = tuple(call for piece in pieces for call in piece.calls)
    return Delta(text, reasoning, last.tokens, last.finish, last.error, calls)


@dataclass(frozen=True)
class Divergence:
    """How an adapter changes the predictions of its base on a text; sums over the text's tokens, in nats."""

    tokens: int
    """Number of predicted tokens: all but the first."""
    loss: float
    """Negative log-likelihood with the adapter."""
    base_loss: float
    """The same without it."""
    kl: float
    """Kullback-Leibler divergence of the adapter's predictions from the base's."""


@dataclass(frozen=True)
class Answer:
    text: str
    reasoning: str
    prompt_tokens: int
    tokens: int
    """Number of generated tokens, including the end token."""
    finish: str
    """Finish reason: stop, tool_calls or length."""
    calls: tuple[Call, ...] = ()
