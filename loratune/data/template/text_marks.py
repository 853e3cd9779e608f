"""Replaces the two characters with which transformers marks control tokens in texts, if a text contains them."""

from __future__ import annotations

import copy
from typing import Any

from loratune.data.formats.conversation import keys_in, texts_in
from loratune.protocols import Tokenizer

MARKS = ("\U000f0000", "\U000f0001")
PRIVATE_USE = range(0xF0002, 0xFFFFE)


def with_marks_kept(tokenizer: Tokenizer, rendered: list[Any]) -> tuple[Any, list[Any]]:
    """Return a tokenizer and messages that `sanitize_control_tokens` encodes to the same ids as the original texts.

    Args:
        tokenizer: a transformers tokenizer.
        rendered: messages and tools, as JSON types.

    Returns:
        The arguments if no text contains a marker. Otherwise the messages contain other characters in place of the
        markers, and the tokenizer translates them back.
    """
    if not any(mark in text for text in (*texts_in(rendered), *keys_in(rendered)) for mark in MARKS):
        return tokenizer, rendered
    stand_ins = free_marks(rendered)
    back = str.maketrans(dict(zip(stand_ins, MARKS, strict=True)))
    other: Any = copy.copy(tokenizer)
    other.encode = lambda text, **options: tokenizer.encode(text.translate(back), **options)
    return other, _translated(rendered, str.maketrans(dict(zip(MARKS, stand_ins, strict=True))))


def free_marks(value: Any) -> tuple[str, str]:
    """Return two characters that occur in no text or key of a JSON value."""
    used = set().union(*texts_in(value), *keys_in(value))
    free = (chr(code) for code in PRIVATE_USE if chr(code) not in used)
    return next(free), next(free)


def _translated(value: Any, table: dict[int, str]) -> Any:
    """Return a JSON value with characters of its texts and keys translated."""
    if isinstance(value, str):
        return value.translate(table)
    if isinstance(value, dict):
        return {_translated(key, table): _translated(inner, table) for key, inner in value.items()}
    return [_translated(inner, table) for inner in value] if isinstance(value, list | tuple) else value
