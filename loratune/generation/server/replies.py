"""What answers look like: OpenAI's objects, whole and in events of a stream."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any, Literal

from pydantic import BaseModel

from loratune.generation.exchange import Piece

Finish = Literal["stop", "length"]


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class SaidMessage(BaseModel):
    """The answer; reasoning_content is there only if the model has reasoned."""

    role: Literal["assistant"]
    content: str
    reasoning_content: str = ""


class ChatChoice(BaseModel):
    """The one answer."""

    index: int
    message: SaidMessage
    logprobs: None
    finish_reason: Finish


class ChatCompletion(BaseModel):
    """The whole of what /v1/chat/completions sends without stream."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(BaseModel):
    """The one continuation."""

    index: int
    text: str
    reasoning_content: str = ""
    logprobs: None
    finish_reason: Finish


class TextCompletion(BaseModel):
    """The whole of what /v1/completions sends without stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class Model(BaseModel):
    """A base or an adapter; parent is the base of an adapter."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None


class ModelList(BaseModel):
    """All that can be asked."""

    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    """Whether questions are taken."""

    status: Literal["ok", "stopping"]


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every failure."""

    error: ErrorDetail


def usage(prompt_tokens: int, tokens: int) -> dict[str, int]:
    """Numbers of tokens of prompt, answer, and both."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}


def event(value: dict[str, Any] | str) -> str:
    """A server-sent event."""
    return f"data: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}\n\n"


class ChatForm:
    """How a chat's answer is written down."""

    prefix = "chatcmpl"
    whole_name = "chat.completion"
    part_name = "chat.completion.chunk"

    def opening(self) -> dict[str, Any] | None:
        """The choice of the first event, before any text; None for no such event."""
        return {"delta": {"role": "assistant", "content": ""}}

    def whole(self, piece: Piece) -> dict[str, Any]:
        """The choice of a whole answer."""
        return {"message": {"role": "assistant", "content": piece.text, **_reasoning(piece)}}

    def part(self, piece: Piece) -> dict[str, Any]:
        """The choice of an event."""
        return {"delta": {**({"content": piece.text} if piece.text else {}), **_reasoning(piece)}}


class TextForm:
    """How a continued text is written down."""

    prefix = "cmpl"
    whole_name = part_name = "text_completion"

    def opening(self) -> dict[str, Any] | None:
        """There is nothing to say before the text."""
        return None

    def whole(self, piece: Piece) -> dict[str, Any]:
        """The choice of a whole answer."""
        return {"text": piece.text, **_reasoning(piece)}

    def part(self, piece: Piece) -> dict[str, Any]:
        """The choice of an event: no other than that of the whole."""
        return self.whole(piece)


class Letter:
    """Writes one answer down.

    Args:
        form: chat or text.
        model: as the request has called it.
        wants_usage: whether a stream tells the numbers of tokens.
    """

    def __init__(self, form: ChatForm | TextForm, model: str, wants_usage: bool) -> None:
        self.form = form
        self.wants_usage = wants_usage
        self.id = f"{form.prefix}-{secrets.token_hex(12)}"
        self._head = {"id": self.id, "created": int(time.time()), "model": model}

    def whole(self, piece: Piece, prompt_tokens: int) -> dict[str, Any]:
        """The whole answer, which is the one piece."""
        choice = {"index": 0, **self.form.whole(piece), "logprobs": None, "finish_reason": piece.finish}
        counts = usage(prompt_tokens, piece.tokens)
        return {**self._head, "object": self.form.whole_name, "choices": [choice], "usage": counts}

    def opening(self) -> str:
        """The first event; empty if there is none."""
        choice = self.form.opening()
        return self._part({"index": 0, **choice, "logprobs": None, "finish_reason": None}) if choice else ""

    def part(self, piece: Piece) -> str:
        """The event of a piece, and after the last one those that end the stream; the caller adds the usage."""
        written = ""
        if piece.text or piece.reasoning:
            written = self._part({"index": 0, **self.form.part(piece), "logprobs": None, "finish_reason": None})
        if piece.finish:
            empty = self.form.part(Piece())
            written += self._part({"index": 0, **empty, "logprobs": None, "finish_reason": piece.finish})
        return written

    def closing(self, prompt_tokens: int, tokens: int) -> str:
        """What comes after the last piece of a stream that has gone well."""
        if not self.wants_usage:
            return event("[DONE]")
        counts = {**self._chunk([]), "usage": usage(prompt_tokens, tokens)}
        return event(counts) + event("[DONE]")

    def _part(self, choice: dict[str, Any]) -> str:
        return event(self._chunk([choice]) | ({"usage": None} if self.wants_usage else {}))

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.form.part_name, "choices": choices}


def _reasoning(piece: Piece) -> dict[str, str]:
    return {"reasoning_content": piece.reasoning} if piece.reasoning else {}
