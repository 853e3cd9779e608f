"""Messages and tools of a request, in OpenAI's form; they are read as the rows of `sft` are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, PrivateAttr, Tag, WithJsonSchema, model_validator

from loratune.data.formats.chat_rows import in_order_of_calls, read_message
from loratune.data.formats.conversation import Message
from loratune.data.formats.row_tools import read_tools
from loratune.generation.server.failures import TAG, ApiError
from loratune.generation.server.fields import LONGEST_TEXT, Content, Fields, Nothing, Text

MOST_CALLS = 128
"""In a message; also the most tools of a request."""
Id = Annotated[str, Field(max_length=512)]
FunctionName = Annotated[str, Field(min_length=1, max_length=256)]


def _refuse_strict(value: bool) -> bool:
    if value:
        raise ValueError("arguments cannot be held to the schema; leave strict out, and check them")
    return value


Lenient = Annotated[bool, AfterValidator(_refuse_strict), WithJsonSchema({"type": "boolean", "const": False})]


class CalledFunction(Fields):
    """Which tool is called, and with what."""

    name: FunctionName
    arguments: Text
    """The JSON text of an object."""


class ToolCall(Fields):
    """A call of a tool in an earlier answer."""

    id: Id
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None
    """Without effect; it comes with streamed calls."""


class OfferedFunction(Fields):
    """What a tool is for, and the JSON schema of its arguments."""

    name: FunctionName
    description: Annotated[str, Field(max_length=LONGEST_TEXT)] | None = None
    parameters: dict[str, Any] | None = None
    strict: Lenient | None = None


class Tool(Fields):
    """A tool that the answer may call. The template gets it as it is, keys in the same order."""

    type: Literal["function"]
    function: OfferedFunction
    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep_as_given(cls, value: Any, handler: Any) -> Any:
        tool = handler(value)
        tool._given = value if isinstance(value, dict) else tool.model_dump(exclude_none=True)
        return tool

    @property
    def given(self) -> dict[str, Any]:
        """As the request has it."""
        return self._given


class Turn(Fields):
    """What all messages share. What clients add to those that they send back is accepted as long as it is empty."""

    name: Annotated[str, Field(max_length=512)] | None = None
    """Without effect on the answer, unless the template writes the names of tools."""
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Nothing | None = None

    def given(self) -> dict[str, Any]:
        """As rows have it."""
        return self.model_dump(include={"role", "content", "name", "tool_calls", "tool_call_id"}, exclude_none=True)


class SaidMessage(Turn):
    """A system prompt, a question, or an answer in words."""

    role: Literal["system", "developer", "user", "assistant"]
    """`developer` is another word for `system`."""
    content: Content
    """Text parts are joined without anything between them."""
    reasoning_content: Text | None = None
    """Of an earlier answer; left out, as the templates of thinking models do."""
    tool_calls: Nothing | None = None


class CallingMessage(Turn):
    """An earlier answer that calls tools."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: Text | None = None
    """Given to the template, which may show the model what it thought before it called."""
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=MOST_CALLS)]

    def given(self) -> dict[str, Any]:
        """As rows have it."""
        thought = {"reasoning_content": self.reasoning_content} if self.reasoning_content else {}
        return super().given() | thought


class ResultMessage(Turn):
    """What a tool has answered."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Id
    """Of the call; results are put in the order of their calls."""
    reasoning_content: None = None
    tool_calls: Nothing | None = None


def _tell_messages(value: Any) -> str:
    if not isinstance(value, dict):
        return f"{TAG}said"
    if value.get("role") == "tool":
        return f"{TAG}result"
    return f"{TAG}calling" if value.get("role") == "assistant" and value.get("tool_calls") else f"{TAG}said"


ChatMessage = Annotated[
    Annotated[SaidMessage, Tag(f"{TAG}said")]
    | Annotated[CallingMessage, Tag(f"{TAG}calling")]
    | Annotated[ResultMessage, Tag(f"{TAG}result")],
    Discriminator(_tell_messages),
]


def read_conversation(messages: Sequence[SaidMessage | CallingMessage | ResultMessage]) -> list[Message]:
    """Messages as templates take them.

    Raises:
        ApiError: one cannot be read.
    """
    turns = [message.given() for message in messages]
    for place, turn in enumerate(turns):
        read = read_message(turn, may_be_blank=True)
        if isinstance(read, str):
            raise ApiError(400, f"messages.{place}: {read}", "invalid_value", f"messages.{place}")
    read_turns = (read_message(turn, may_be_blank=True) for turn in in_order_of_calls(turns))
    return [turn for turn in read_turns if not isinstance(turn, str)]


def read_offer(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as templates take them.

    Raises:
        ApiError: they cannot be read.
    """
    read = read_tools([tool.given for tool in tools])
    if isinstance(read, str):
        raise ApiError(400, f"tools: {read}", "invalid_value", "tools")
    return read
