"""What loratune uses of a tokenizer of transformers, so that a misspelt name is an error before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


class AddedToken(Protocol):
    """A token that a tokenizer has besides those of its vocabulary."""

    content: str
    special: bool
    normalized: bool
    lstrip: bool
    rstrip: bool
    single_word: bool


class Encoding(Protocol):
    """What calling a tokenizer gives: lists of ids for one text, lists of such lists for several."""

    input_ids: list[Any]


@runtime_checkable
class Tokenizer(Protocol):
    """A tokenizer as `load_tokenizer` sets it up."""

    chat_template: Any
    """Text, or name → text; None without one."""
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token: str | None
    pad_token_id: int
    """As `set_pad_token` leaves it."""
    unk_token_id: int | None
    split_special_tokens: bool
    backend_tokenizer: Any
    """That of the library tokenizers, if there is one."""
    added_tokens_decoder: Mapping[int, AddedToken]
    added_tokens_encoder: Mapping[str, int]
    chat_control_tokens: list[str]
    """What no text of a conversation becomes; loratune sets it."""

    def __call__(self, text: Any, **options: Any) -> Encoding:
        """Encode a text, or a list of them."""

    def encode(self, text: Any, **options: Any) -> list[int]:
        """The ids of a text."""

    def decode(self, token_ids: Any, **options: Any) -> str:
        """The text of ids."""

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        """The name of a token, or of each of several."""

    def convert_tokens_to_ids(self, tokens: str) -> Any:
        """The id of a token by its name; another's or None where there is none."""

    def get_vocab(self) -> dict[str, int]:
        """Name → id of every token."""

    def get_chat_template(self, chat_template: str | None = None, tools: Sequence[Any] | None = None) -> str:
        """The text that renders conversations, with these tools."""

    def apply_chat_template(self, conversation: Iterable[Any], tools: Any = None, **options: Any) -> Any:
        """Render a conversation: ids or text, as the options say."""
