"""Request schemas of OpenAI's API; unsupported fields are rejected with an error that names them."""

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
    StopSignals,
    Tokens,
    Zero,
)
from loratune.generation.server.messages import MOST_CALLS, ChatMessage, Tool, read_conversation, read_offer


def _refuse_force(value: Any) -> Any:
    if value == "required" or isinstance(value, dict):
        raise ValueError("a call cannot be forced; use auto or none")
    return value


def _told(name: str, more: str = "the default is the model's own") -> Any:
    """Return a field with the description of the sampling setting of the same name."""
    setting = NUMBERS[name]
    known = more if setting.default is None else f"the default is {setting.default:g}"
    return Field(default=None, description=f"{setting.about[:-1]}; {known}.")


AnySeed = Annotated[int, WHOLE, AfterValidator(lambda seed: seed % SEEDS)]
"""Clients send signed 64-bit seeds; the setting has 32 bits."""


class StreamOptions(Fields):
    """Options of a streamed answer."""

    include_usage: bool | None = None
    """Add an event with token counts before the end."""
    include_obfuscation: No | None = None


class AnswerRequest(Fields):
    """Fields of both endpoints."""

    model: Name
    """The base or an adapter, as listed by `/v1/models`."""
    temperature: Temperature | None = _told("temperature")
    top_p: TopP | None = _told("top_p")
    top_k: Annotated[TopK, WHOLE] | None = _told("top_k")
    min_p: MinP | None = _told("min_p")
    repetition_penalty: RepetitionPenalty | None = _told("repetition_penalty")
    max_tokens: Tokens | None = None
    """Maximum tokens of the answer, up to the server's limit, which is the default."""
    stop: StopSignals | None = None
    """Strings that end the answer; they are not part of it."""
    seed: AnySeed | None = _told("seed", "any integer, counted modulo 2**32")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=1), WHOLE] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None
    """Ignored."""
    metadata: Annotated[dict[str, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None
    """Ignored."""
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = None
    """Ignored; the KV cache of shared prompt prefixes is always reused."""
    safety_identifier: Annotated[str, Field(max_length=512)] | None = None
    """Ignored."""
    service_tier: Literal["auto", "default"] | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream includes token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, most_new_tokens: int) -> Sampling:
        """Return the sampling settings.

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
        """Return the request's limit of tokens."""
        return self.max_tokens


class TextFormat(Fields):
    """The only supported format."""

    type: Literal["text"]


class ChatRequest(AnswerRequest):
    """A conversation whose last message is to be answered."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1024)]
    """The last one must have the role user or tool."""
    max_completion_tokens: Tokens | None = None
    """The newer name of `max_tokens`."""
    response_format: TextFormat | None = None
    logprobs: No | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0), WHOLE] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_CALLS)] | None = None
    """Tools that the answer may call, if the model's chat template supports tools."""
    tool_choice: Annotated[Literal["none", "auto"], BeforeValidator(_refuse_force)] | None = None
    """`none` removes the tools from the prompt."""
    parallel_tool_calls: bool | None = None
    """False ends the answer after its first call."""
    functions: Nothing | None = None
    function_call: Literal["none", "auto"] | None = None
    store: No | None = None

    def asked(self) -> list[Message]:
        """Return the conversation.

        Raises:
            ApiError: it is invalid, or does not end with a message of user or tool.
        """
        if self.messages[-1].role not in ("user", "tool"):
            raise ApiError(400, "messages: the last one must be the user's, or a tool's", "invalid_value", "messages")
        return read_conversation(self.messages)

    def offered(self) -> list[dict[str, Any]]:
        """Return the tools that may be called.

        Raises:
            ApiError: they are invalid.
        """
        return [] if self.tool_choice == "none" else read_offer(self.tools or [])

    @property
    def most_calls(self) -> int | None:
        """The maximum number of calls; None for no limit."""
        return 1 if self.parallel_tool_calls is False else None

    def longest(self) -> int | None:
        """Return the smaller limit if both names are used."""
        return min(filter(None, (self.max_tokens, self.max_completion_tokens)), default=None)


class LoadRequest(Fields):
    """An adapter to be loaded, as vLLM's clients name it."""

    lora_name: Name
    """The name to offer it under."""
    lora_path: Name
    """Its folder in the store: the folder's name, or the path that ends with it."""
    load_inplace: bool = False
    """Replace an adapter that has been loaded under this name."""


class UnloadRequest(Fields):
    """An adapter not to be offered any more."""

    lora_name: Name
    lora_int_id: Annotated[int, WHOLE] | None = None
    """Ignored."""


class CompletionRequest(AnswerRequest):
    """A text to continue without a chat template."""

    prompt: Prompt
    best_of: Annotated[int, Field(ge=1, le=1), WHOLE] | None = None
    echo: No | None = None
    logprobs: None = None
    suffix: Literal[""] | None = None

    def asked(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]

    def offered(self) -> list[dict[str, Any]]:
        """Return no tools, since without a template the model cannot see them."""
        return []

    most_calls: ClassVar[None] = None
