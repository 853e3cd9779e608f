"""What answers look like: OpenAI's objects, whole and in events of a stream."""

from __future__ import annotations

import json
import secrets
import string
import time
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel

from loratune.data.tools.call_shapes import Call
from loratune.engine.exchange import Piece

Finish = Literal["stop", "length", "tool_calls"]

ID_CHARACTERS = string.ascii_letters + string.digits


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CalledFunction(BaseModel):
    """Which tool is called, as the model has written it; arguments are the JSON text of an object."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(BaseModel):
    """The answer; content is null if there are only calls. Empty reasoning and an empty list of calls are left out."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str = ""
    tool_calls: list[ToolCall] = []


class ChatChoice(BaseModel):
    """The one answer."""

    index: int
    message: AnswerMessage
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

    def __init__(self) -> None:
        self._calls = 0
        """Told so far."""

    def whole(self, piece: Piece) -> dict[str, Any]:
        """The choice of a whole answer."""
        calls = {"tool_calls": [_called(call) for call in piece.calls]} if piece.calls else {}
        content = None if piece.calls and not piece.text else piece.text
        return {"message": {"role": "assistant", "content": content, **_reasoning(piece), **calls}}

    def parts(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """The choices of a piece's events: what is said, then the head and the arguments of each call."""
        if piece.text or piece.reasoning:
            yield {"delta": {**({"content": piece.text} if piece.text else {}), **_reasoning(piece)}}
        for call in piece.calls:
            whole = _called(call)
            head = {**whole, "function": {**whole["function"], "arguments": ""}}
            yield {"delta": {"tool_calls": [{"index": self._calls, **head}]}}
            arguments = {"arguments": whole["function"]["arguments"]}
            yield {"delta": {"tool_calls": [{"index": self._calls, "function": arguments}]}}
            self._calls += 1

    def ending(self) -> dict[str, Any]:
        """The choice of the event that says how the answer has ended."""
        return {"delta": {}}


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

    def parts(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """The choice of an event: no other than that of the whole."""
        if piece.text or piece.reasoning:
            yield self.whole(piece)

    def ending(self) -> dict[str, Any]:
        """The choice of the event that says how the answer has ended."""
        return self.whole(Piece())


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
        """The events of a piece, and after the last one those that end the stream; the caller adds the usage."""
        written = "".join(
            self._part({"index": 0, **choice, "logprobs": None, "finish_reason": None})
            for choice in self.form.parts(piece)
        )
        if piece.finish:
            ending = {"index": 0, **self.form.ending(), "logprobs": None, "finish_reason": piece.finish}
            written += self._part(ending)
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


def _called(call: Call) -> dict[str, Any]:
    """A call as OpenAI writes it; its id is one that Mistral's templates would take too."""
    function = {"name": call.name, "arguments": call.arguments_text}
    return {"id": "".join(secrets.choice(ID_CHARACTERS) for _ in range(9)), "type": "function", "function": function}


def _reasoning(piece: Piece) -> dict[str, str]:
    return {"reasoning_content": piece.reasoning} if piece.reasoning else {}
