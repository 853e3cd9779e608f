"""The attributes of transformers and PEFT objects that loratune uses, so that type checking finds a misspelt name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

Itself = TypeVar("Itself")


class AddedToken(Protocol):
    """A token added to a tokenizer's vocabulary."""

    content: str
    special: bool
    normalized: bool
    lstrip: bool
    rstrip: bool
    single_word: bool


class Encoding(Protocol):
    """Result of calling a tokenizer: a list of ids for one text, a list of lists for several."""

    input_ids: list[Any]


@runtime_checkable
class Tokenizer(Protocol):
    """A tokenizer as configured by `load_tokenizer`."""

    chat_template: Any
    """Text, or name → text; None if there is none."""
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token: str | None
    pad_token_id: int
    """As set by `set_pad_token`."""
    unk_token_id: int | None
    split_special_tokens: bool
    backend_tokenizer: Any
    """The tokenizer of the tokenizers library, if it is a fast tokenizer."""
    added_tokens_decoder: Mapping[int, AddedToken]
    added_tokens_encoder: Mapping[str, int]
    chat_control_tokens: list[str]
    """Tokens that no text of a conversation may become; set by loratune."""

    def __call__(self, text: Any, **options: Any) -> Encoding:
        """Encode a text, or a list of texts."""

    def encode(self, text: Any, **options: Any) -> list[int]:
        """Return the ids of a text."""

    def decode(self, token_ids: Any, **options: Any) -> str:
        """Return the text of ids."""

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """Return the names of one or several tokens."""

    def convert_tokens_to_ids(self, tokens: str) -> Any:
        """Return the id of a token; another one or None if it does not exist."""

    def get_vocab(self) -> dict[str, int]:
        """Return name → id of every token."""

    def get_chat_template(self, chat_template: str | None = None, tools: Sequence[Any] | None = None) -> str:
        """Return the template for conversations with these tools."""

    def apply_chat_template(self, conversation: Iterable[Any], tools: Any = None, **options: Any) -> Any:
        """Render a conversation: ids or text, as the options say."""


class ModelConfig(Protocol):
    """A model's config, which may describe more than a language model."""

    model_type: str
    tie_word_embeddings: bool
    _attn_implementation: str
    """Chosen by transformers."""

    def get_text_config(self, decoder: bool | None = None) -> TextConfig:
        """Return the part that describes the language model; it may be the config itself."""


class TextConfig(ModelConfig, Protocol):
    """A language model's config; getattr reads what only some architectures have."""

    vocab_size: int
    max_position_embeddings: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_size: int
    intermediate_size: int
    hidden_act: str
    rms_norm_eps: float
    rope_parameters: dict[str, Any]


class Module(Protocol):
    """A torch module."""

    training: bool

    def eval(self: Itself) -> Itself:
        """Switch dropout off."""

    def train(self: Itself, mode: bool = True) -> Itself:
        """Switch dropout on, or off."""

    def float(self: Itself) -> Itself:
        """Convert all weights to float32."""

    def modules(self) -> Iterator[Any]:
        """Yield the module and its descendants."""

    def named_modules(self) -> Iterator[tuple[str, Any]]:
        """Yield them with their paths."""

    def parameters(self) -> Iterator[Any]:
        """Yield each parameter once."""

    def named_parameters(self, *, remove_duplicate: bool = True) -> Iterator[tuple[str, Any]]:
        """Yield them with their paths."""

    def buffers(self) -> Iterator[Any]:
        """Yield tensors that are not parameters."""

    def named_buffers(self) -> Iterator[tuple[str, Any]]:
        """Yield them with their paths."""

    def state_dict(self) -> dict[str, Any]:
        """Return path → tensor."""

    def requires_grad_(self: Itself, requires_grad: bool = True) -> Itself:
        """Train all parameters, or none."""


class Decoder(Module, Protocol):
    """Maps token ids to the last hidden states."""

    config: ModelConfig
    device: Any
    dtype: Any
    forward: Callable[..., Any]
    rotary_emb: Any
    """Computes the rotary frequencies."""

    def __call__(self, **inputs: Any) -> Any:
        """Return an output with `last_hidden_state`."""

    def register_forward_hook(self, hook: Callable[..., Any]) -> Any:
        """Call a function after each forward pass; the result removes it again."""


class CausalModel(Module, Protocol):
    """A causal language model, with or without PEFT's wrapper."""

    config: ModelConfig
    generation_config: Any
    """Sampling defaults of the model's authors."""
    base_model_prefix: str
    """Prefix that transformers leaves out of tensor names."""
    base_model: Any
    """The next inner module: the decoder, or PEFT's tuner between its wrapper and the model."""
    device: Any
    dtype: Any
    forward: Callable[..., Any]

    def __call__(self, **inputs: Any) -> Any:
        """Return an output with `logits`."""

    def generate(self, **inputs: Any) -> Any:
        """Return the token ids of prompts and answers."""

    def get_decoder(self) -> Any:
        """Return the decoder; some models return themselves."""

    def get_input_embeddings(self) -> Any:
        """Return the embedding layer."""

    def get_output_embeddings(self) -> Any:
        """Return the layer that computes the logits."""

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Select an attention implementation by name."""

    def set_experts_implementation(self, experts_implementation: str) -> None:
        """Choose how the matrices of a mixture's experts are computed with; nothing changes in other models."""

    def tie_weights(self) -> None:
        """Share the embedding's matrix with the head if the config says so."""

    def save_pretrained(self, save_directory: Any, **options: Any) -> None:
        """Write the weights; a PEFT model writes its adapters only."""


class AdaptedModel(CausalModel, Protocol):
    """A PEFT model: a causal language model with adapters."""

    active_adapter: str
    peft_config: Mapping[str, Any]
    """Name of an adapter → its config."""
    create_or_update_model_card: Callable[[Any], None]
    """Writes a README.md next to a saved adapter."""

    def get_base_model(self) -> CausalModel:
        """Return the causal language model without PEFT's wrapper."""

    def add_adapter(self, adapter_name: str, peft_config: Any) -> None:
        """Add an adapter with random weights."""

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; another one becomes active if it was."""

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str, **how: Any) -> None:
        """Add a combination of existing adapters."""

    def set_adapter(self, adapter_name: str) -> None:
        """Activate one adapter."""

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the numbers of trained and of all parameters."""
