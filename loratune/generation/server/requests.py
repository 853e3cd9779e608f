"""What may stand in a request: OpenAI's fields; what cannot be honoured is refused by its name, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)

from loratune.data.conversation import Message
from loratune.generation.server.failures import TAG, ApiError
from loratune.model.sampling import Sampling

MOST_TOKENS = 1_048_576
LONGEST_TEXT = 4 * 2**20
"""Characters of one text; the limit on the whole body is lower for most."""


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 1.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refuse(value: bool) -> bool:
    if value:
        raise ValueError("is not supported")
    return value


WHOLE = BeforeValidator(_whole)
No = Annotated[bool, AfterValidator(_refuse), WithJsonSchema({"type": "boolean", "const": False})]
Text = Annotated[str, Field(max_length=LONGEST_TEXT)]
Name = Annotated[str, Field(min_length=1, max_length=1024)]
Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS), WHOLE]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Nothing = Annotated[list[Any], Field(max_length=0)]
Zero = Annotated[float, Field(ge=0, le=0)]


NOTHING: tuple[Any, ...] = (None, False, "", [], {})
"""Values that ask for nothing, whatever the field is called: clients send whole objects with most fields unset."""


def _allow_nothing(schema: dict[str, Any]) -> None:
    schema["additionalProperties"] = {"enum": list(NOTHING)}


class Fields(BaseModel):
    """A part of a request: no other types, and no other fields that ask for something."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        json_schema_extra=_allow_nothing,
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        # 0 == False, but 0 may ask for something.
        return {
            key: inner
            for key, inner in value.items()
            if key in cls.model_fields
            or not any(inner is one or (one is not False and inner == one) for one in NOTHING)
        }


class TextPart(Fields):
    """A part of a message's content; images and sound are not understood."""

    type: Literal["text"]
    text: Text


def _tell_contents(value: Any) -> str:
    return f"{TAG}parts" if isinstance(value, list) else f"{TAG}text"


def _tell_lists(value: Any) -> str:
    return f"{TAG}list" if isinstance(value, list) else f"{TAG}text"


Parts = Annotated[list[TextPart], Field(min_length=1, max_length=256)]
Content = Annotated[
    Annotated[Text, Tag(f"{TAG}text")] | Annotated[Parts, Tag(f"{TAG}parts")], Discriminator(_tell_contents)
]
Stops = Annotated[
    Annotated[Stop, Tag(f"{TAG}text")] | Annotated[Annotated[list[Stop], Field(max_length=16)], Tag(f"{TAG}list")],
    Discriminator(_tell_lists),
]
Prompt = Annotated[
    Annotated[Annotated[Text, Field(min_length=1)], Tag(f"{TAG}text")]
    | Annotated[
        Annotated[list[Annotated[Text, Field(min_length=1)]], Field(min_length=1, max_length=1)], Tag(f"{TAG}list")
    ],
    Discriminator(_tell_lists),
]


class ChatMessage(Fields):
    """One turn. What clients add to an answer that they send back is accepted as long as it is empty."""

    role: Literal["system", "developer", "user", "assistant"]
    """`developer` is another word for `system`."""
    content: Content
    """Text parts are joined without anything between them."""
    name: Annotated[str, Field(max_length=512)] | None = None
    """Without effect on the answer."""
    reasoning_content: Text | None = None
    """Of an earlier answer; left out, as the templates of thinking models do."""
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing | None = None
    annotations: Nothing | None = None

    def message(self) -> Message:
        """As the templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class StreamOptions(Fields):
    """How an answer is streamed."""

    include_usage: bool | None = None
    """Add an event with the numbers of tokens before the end."""
    include_obfuscation: No | None = None


class AnswerRequest(Fields):
    """What both kinds of request share."""

    model: Name
    """The base or an adapter, as `/v1/models` lists them."""
    temperature: Annotated[float, Field(ge=0, le=5)] | None = None
    """0, the default, takes the likeliest token every time."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Draw from the likeliest tokens that together have this probability; the default is the model's own."""
    top_k: Annotated[int, Field(ge=0, le=MOST_TOKENS), WHOLE] | None = None
    """Draw from so many of the likeliest tokens; 0 from all; the default is the model's own."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Draw from tokens that are at least this share as likely as the likeliest."""
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] | None = None
    """Above 1 makes tokens that have been there less likely."""
    max_tokens: Tokens | None = None
    """Longest answer; never more than the server's own limit, which is also the default."""
    stop: Stops | None = None
    """Texts that end the answer; they are not part of it."""
    seed: Annotated[int, WHOLE] | None = None
    """Makes drawing repeatable, whatever else the server does; counts modulo 2**63."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=1), WHOLE] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    """Without effect on the answer."""
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None
    """Without effect on the answer."""
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None
    """Without effect: of a conversation only what is new is read anyway."""
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    """Without effect on the answer."""
    service_tier: Literal["auto", "default"] | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream is to tell the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, most_new_tokens: int) -> Sampling:
        """How the answer is drawn.

        Args:
            most_new_tokens: the server's limit.
        """
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            temperature=self.temperature or 0.0,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            max_new_tokens=min(self.longest() or most_new_tokens, most_new_tokens),
            stop=stop,
            seed=None if self.seed is None else self.seed % 2**63,
        )

    def longest(self) -> int | None:
        """Tokens of the longest answer that the request allows."""
        return self.max_tokens


class TextFormat(Fields):
    """The only form of answers."""

    type: Literal["text"]


class ChatRequest(AnswerRequest):
    """A conversation, the answer to whose last message is wanted."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)]
    """The last one must be the user's."""
    max_completion_tokens: Tokens | None = None
    """The newer name of `max_tokens`."""
    response_format: TextFormat | None = None
    logprobs: No | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0), WHOLE] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    """Without effect, since there are no tools."""
    functions: Nothing | None = None
    function_call: Literal["none", "auto"] | None = None
    store: No | None = None

    def asked(self) -> list[Message]:
        """The conversation.

        Raises:
            ApiError: it does not end with a message of the user.
        """
        if self.messages[-1].role != "user":
            raise ApiError(400, "messages: the last one must be the user's", "invalid_value", "messages")
        return [message.message() for message in self.messages]

    def longest(self) -> int | None:
        """The smaller one, should both names be used."""
        return min(filter(None, (self.max_tokens, self.max_completion_tokens)), default=None)


class CompletionRequest(AnswerRequest):
    """A text to be continued as it stands, without template."""

    prompt: Prompt
    best_of: Annotated[int, Field(ge=1, le=1), WHOLE] | None = None
    echo: No | None = None
    logprobs: None = None
    suffix: Literal[""] | None = None

    def asked(self) -> str:
        """The text."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]
