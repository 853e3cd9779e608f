"""What may stand in a request: OpenAI's fields; what cannot be honoured is refused by its name, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from loratune.data.formats.conversation import Message
from loratune.engine.sampling import NUMBERS, SEEDS, MinP, RepetitionPenalty, Sampling, Temperature, TopK, TopP
from loratune.generation.server.failures import ApiError
from loratune.generation.server.fields import (
    WHOLE,
    Fields,
    Name,
    No,
    Nothing,
    Prompt,
    Stops,
    Tokens,
    Zero,
)
from loratune.generation.server.messages import MOST_CALLS, ChatMessage, Tool, read_conversation, read_offer


def _refuse_force(value: Any) -> Any:
    if value == "required" or isinstance(value, dict):
        raise ValueError("a call cannot be forced; take auto or none")
    return value


def _told(name: str, more: str = "the default is the model's own") -> Any:
    """A field that says what the sampling setting of its name says."""
    setting = NUMBERS[name]
    known = more if setting.default is None else f"the default is {setting.default:g}"
    return Field(default=None, description=f"{setting.about[:-1]}; {known}.")


AnySeed = Annotated[int, WHOLE, AfterValidator(lambda seed: seed % SEEDS)]
"""Clients send seeds of 64 bits, with a sign, where a setting has 32."""


class StreamOptions(Fields):
    """How an answer is streamed."""

    include_usage: bool | None = None
    """Add an event with the numbers of tokens before the end."""
    include_obfuscation: No | None = None


class AnswerRequest(Fields):
    """What both kinds of request share."""

    model: Name
    """The base or an adapter, as `/v1/models` lists them."""
    temperature: Temperature | None = _told("temperature")
    top_p: TopP | None = _told("top_p")
    top_k: Annotated[TopK, WHOLE] | None = _told("top_k")
    min_p: MinP | None = _told("min_p")
    repetition_penalty: RepetitionPenalty | None = _told("repetition_penalty")
    max_tokens: Tokens | None = None
    """Longest answer; never more than the server's own limit, which is also the default."""
    stop: Stops | None = None
    """Texts that end the answer; they are not part of it."""
    seed: AnySeed | None = _told("seed", "any integer, counted modulo 2**32")
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
            seed=self.seed,
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
    """The last one must be the user's, or a tool's."""
    max_completion_tokens: Tokens | None = None
    """The newer name of `max_tokens`."""
    response_format: TextFormat | None = None
    logprobs: No | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0), WHOLE] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_CALLS)] | None = None
    """What the answer may call, if the model's chat template tells it of tools."""
    tool_choice: Annotated[Literal["none", "auto"], BeforeValidator(_refuse_force)] | None = None
    """`none` leaves the tools out of the prompt."""
    parallel_tool_calls: bool | None = None
    """False ends the answer after its first call."""
    functions: Nothing | None = None
    function_call: Literal["none", "auto"] | None = None
    store: No | None = None

    def asked(self) -> list[Message]:
        """The conversation.

        Raises:
            ApiError: it cannot be read, or does not end with a message of user or tool.
        """
        if self.messages[-1].role not in ("user", "tool"):
            raise ApiError(400, "messages: the last one must be the user's, or a tool's", "invalid_value", "messages")
        return read_conversation(self.messages)

    def offered(self) -> list[dict[str, Any]]:
        """The tools that may be called.

        Raises:
            ApiError: they cannot be read.
        """
        return [] if self.tool_choice == "none" else read_offer(self.tools or [])

    @property
    def most_calls(self) -> int | None:
        """After how many the answer ends; None for no limit."""
        return 1 if self.parallel_tool_calls is False else None

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

    def offered(self) -> list[dict[str, Any]]:
        """No tools: there is no template to tell the model of them."""
        return []

    most_calls: ClassVar[None] = None
