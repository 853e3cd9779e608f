"""Messages and tools of a request in OpenAI's format, parsed like the rows of `sft`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from loratune.data.formats.chat_rows import in_order_of_calls, read_message
from loratune.data.formats.conversation import Message
from loratune.data.formats.row_tools import read_tools
from loratune.generation.server.failures import TAG, ApiError
from loratune.generation.server.fields import LONGEST_TEXT, Content, Fields, Nothing, Text

MOST_CALLS = 128
"""Per message; also the maximum number of tools of a request."""
ROLES = ("system", "developer", "user", "assistant", "tool")
Id = Annotated[str, Field(max_length=512)]
FunctionName = Annotated[str, Field(min_length=1, max_length=256)]


def _refuse_strict(value: bool) -> bool:
    if value:
        raise ValueError("arguments are not constrained to the schema; remove strict, and validate them")
    return value


def _name_all_roles(value: Any) -> Any:
    """Refuse an unknown role with all of them: each kind of message knows its own alone."""
    if isinstance(value, str) and value not in ROLES:
        raise PydanticCustomError("literal_error", "must be system, developer, user, assistant or tool")
    return value


Lenient = Annotated[bool, AfterValidator(_refuse_strict), WithJsonSchema({"type": "boolean", "const": False})]


class CalledFunction(Fields):
    """Name and arguments of a tool call."""

    name: FunctionName
    arguments: Text
    """The JSON text of an object."""


class ToolCall(Fields):
    """A tool call in an earlier answer."""

    id: Id
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None
    """Ignored; present in streamed calls."""


class OfferedFunction(Fields):
    """Description of a tool, and the JSON schema of its arguments."""

    name: FunctionName
    description: Annotated[str, Field(max_length=LONGEST_TEXT)] | None = None
    parameters: dict[str, Any] | None = None
    strict: Lenient | None = None


class Tool(Fields):
    """A tool that the answer may call. The template gets it unchanged, including the order of keys."""

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
        """The tool as in the request."""
        return self._given


class Turn(Fields):
    """Fields of all messages. Fields that clients copy from responses are accepted if they are empty."""

    name: Annotated[str, Field(max_length=512)] | None = None
    """Ignored, unless the template renders the names of tools."""
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Nothing | None = None

    def given(self) -> dict[str, Any]:
        """Return the message in the form of training rows."""
        told = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"}
        return self.model_dump(include=told, exclude_none=True)


class SaidMessage(Turn):
    """A system prompt, a question, or an answer without tool calls."""

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_name_all_roles)]
    """`developer` is an alias of `system`."""
    content: Content
    """Text parts are concatenated."""
    reasoning_content: Text | None = None
    """Reasoning of an earlier answer. The template decides whether it stays in the prompt."""
    tool_calls: Nothing | None = None


class CallingMessage(Turn):
    """An earlier answer with tool calls."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: Text | None = None
    """Passed to the template, which may render the reasoning before the call."""
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=MOST_CALLS)]


class ResultMessage(Turn):
    """The result of a tool call."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Id
    """Id of the call; results are sorted into the order of their calls."""
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
    """Convert messages to the form of chat templates.

    Raises:
        ApiError: a message is invalid.
    """
    turns = [message.given() for message in messages]
    for place, turn in enumerate(turns):
        read = read_message(turn, may_be_blank=True)
        if isinstance(read, str):
            raise ApiError(400, f"messages.{place}: {read}", "invalid_value", f"messages.{place}")
    read_turns = (read_message(turn, may_be_blank=True) for turn in in_order_of_calls(turns))
    return [turn for turn in read_turns if not isinstance(turn, str)]


def read_offer(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Convert tools to the form of chat templates.

    Raises:
        ApiError: a tool is invalid.
    """
    read = read_tools([tool.given for tool in tools])
    if isinstance(read, str):
        raise ApiError(400, f"tools: {read}", "invalid_value", "tools")
    return read
