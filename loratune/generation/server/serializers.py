"""Response objects of OpenAI's API, complete and as streamed chunks."""

from __future__ import annotations

import json
import secrets
import string
import time
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel

from loratune.data.tools.call_shapes import Call
from loratune.engine.types import Delta

Finish = Literal["stop", "length", "tool_calls"]

ID_CHARACTERS = string.ascii_letters + string.digits


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CalledFunction(BaseModel):
    """Name and arguments of a tool call; arguments are the JSON text of an object."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A tool call."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(BaseModel):
    """The answer. Content is null if there are only tool calls; empty reasoning and calls are omitted."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str = ""
    tool_calls: list[ToolCall] = []


class ChatChoice(BaseModel):
    """The only choice."""

    index: int
    message: AnswerMessage
    logprobs: None
    finish_reason: Finish


class ChatCompletion(BaseModel):
    """Response of /v1/chat/completions without streaming."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(BaseModel):
    """The only choice."""

    index: int
    text: str
    reasoning_content: str = ""
    logprobs: None
    finish_reason: Finish


class TextCompletion(BaseModel):
    """Response of /v1/completions without streaming."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class Model(BaseModel):
    """A base model, or an adapter with its base as parent."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    """The base, or the adapter's folder in the store."""
    parent: str | None


class ModelList(BaseModel):
    """All available models."""

    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    """State of the server."""

    status: Literal["ok", "stopping"]


class ErrorDetail(BaseModel):
    """Description of an error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Response of every failed request."""

    error: ErrorDetail


FAILURES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be answered."},
    "5XX": {"model": ErrorBody, "description": "The server cannot answer now."},
}


def usage(prompt_tokens: int, tokens: int) -> dict[str, int]:
    """Return the token counts of prompt, answer, and both."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}


def event(value: dict[str, Any] | str) -> str:
    """Encode a server-sent event."""
    return f"data: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}\n\n"


class ChatForm:
    """Serialises answers of /v1/chat/completions."""

    prefix = "chatcmpl"
    whole_name = "chat.completion"
    part_name = "chat.completion.chunk"

    def opening(self) -> dict[str, Any] | None:
        """Return the choice of the first event, before any text; None for no such event."""
        return {"delta": {"role": "assistant", "content": ""}}

    def __init__(self) -> None:
        self._calls = 0
        """Number of calls sent so far."""

    def whole(self, piece: Delta) -> dict[str, Any]:
        """Return the choice of a complete answer."""
        calls = {"tool_calls": [_called(call) for call in piece.calls]} if piece.calls else {}
        content = None if piece.calls and not piece.text else piece.text
        return {"message": {"role": "assistant", "content": content, **_reasoning(piece), **calls}}

    def parts(self, piece: Delta) -> Iterator[dict[str, Any]]:
        """Yield the choices of a chunk's events: text, then the head and the arguments of each call."""
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
        """Return the choice of the event with the finish reason."""
        return {"delta": {}}


class TextForm:
    """Serialises answers of /v1/completions."""

    prefix = "cmpl"
    whole_name = part_name = "text_completion"

    def opening(self) -> dict[str, Any] | None:
        """Return None: there is no event before the text."""
        return None

    def whole(self, piece: Delta) -> dict[str, Any]:
        """Return the choice of a complete answer."""
        return {"text": piece.text, **_reasoning(piece)}

    def parts(self, piece: Delta) -> Iterator[dict[str, Any]]:
        """Yield the choice of a chunk's event, which has the same form as that of a complete answer."""
        if piece.text or piece.reasoning:
            yield self.whole(piece)

    def ending(self) -> dict[str, Any]:
        """Return the choice of the event with the finish reason."""
        return self.whole(Delta())


class Serializer:
    """Serialises one answer.

    Args:
        form: chat or text.
        model: the model's name in the request.
        wants_usage: whether a stream includes token counts.
    """

    def __init__(self, form: ChatForm | TextForm, model: str, wants_usage: bool) -> None:
        self.form = form
        self.wants_usage = wants_usage
        self.id = f"{form.prefix}-{secrets.token_hex(12)}"
        self._head = {"id": self.id, "created": int(time.time()), "model": model}

    def whole(self, piece: Delta, prompt_tokens: int) -> dict[str, Any]:
        """Return the response for a complete answer."""
        choice = {"index": 0, **self.form.whole(piece), "logprobs": None, "finish_reason": piece.finish}
        counts = usage(prompt_tokens, piece.tokens)
        return {**self._head, "object": self.form.whole_name, "choices": [choice], "usage": counts}

    def opening(self) -> str:
        """Return the first event; empty if there is none."""
        choice = self.form.opening()
        return self._part({"index": 0, **choice, "logprobs": None, "finish_reason": None}) if choice else ""

    def part(self, piece: Delta) -> str:
        """Return the events of a chunk, including the finish reason after the last one; the caller adds the usage."""
        written = "".join(
            self._part({"index": 0, **choice, "logprobs": None, "finish_reason": None})
            for choice in self.form.parts(piece)
        )
        if piece.finish:
            ending = {"index": 0, **self.form.ending(), "logprobs": None, "finish_reason": piece.finish}
            written += self._part(ending)
        return written

    def closing(self, prompt_tokens: int, tokens: int) -> str:
        """Return the events after the last chunk of a successful stream."""
        if not self.wants_usage:
            return event("[DONE]")
        counts = {**self._chunk([]), "usage": usage(prompt_tokens, tokens)}
        return event(counts) + event("[DONE]")

    def _part(self, choice: dict[str, Any]) -> str:
        return event(self._chunk([choice]) | ({"usage": None} if self.wants_usage else {}))

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": self.form.part_name, "choices": choices}


def _called(call: Call) -> dict[str, Any]:
    """Return a call in OpenAI's format; its id is also valid for Mistral's templates."""
    function = {"name": call.name, "arguments": call.arguments_text}
    return {"id": "".join(secrets.choice(ID_CHARACTERS) for _ in range(9)), "type": "function", "function": function}


def _reasoning(piece: Delta) -> dict[str, str]:
    return {"reasoning_content": piece.reasoning} if piece.reasoning else {}
