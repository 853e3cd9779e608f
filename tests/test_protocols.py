"""What is said of a tokenizer's attributes, against the tokenizers that tests have."""

from __future__ import annotations

from typing import get_type_hints

from conftest import TINY_QWEN

from loratune.model.tokenizer import load_tokenizer
from loratune.protocols import AddedToken, Tokenizer


def test_a_tokenizer_has_everything_that_loratune_asks_of_one() -> None:
    tokenizer = load_tokenizer(TINY_QWEN)
    assert isinstance(tokenizer, Tokenizer)
    for token in tokenizer.added_tokens_decoder.values():
        assert all(hasattr(token, name) for name in get_type_hints(AddedToken))


def test_a_tokenizer_that_was_not_set_up_is_none() -> None:
    tokenizer = load_tokenizer(TINY_QWEN)
    del tokenizer.chat_control_tokens
    assert not isinstance(tokenizer, Tokenizer)
