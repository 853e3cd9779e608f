"""The parts of transformers' tokenizer that loratune uses, as protocols for type checking."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


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
        """Render a conversation as ids or text."""
