"""Marks around control tokens in texts: two characters that transformers sets, or others where a text holds them."""

from __future__ import annotations

import copy
from typing import Any

from loratune.data.formats.conversation import keys_in, texts_in
from loratune.protocols import Tokenizer

MARKS = ("\U000f0000", "\U000f0001")
PRIVATE_USE = range(0xF0002, 0xFFFFE)


def with_marks_kept(tokenizer: Tokenizer, rendered: list[Any]) -> tuple[Any, list[Any]]:
    """A tokenizer and messages that give, through `sanitize_control_tokens`, the ids that the whole texts have.

    Args:
        tokenizer: a transformers tokenizer.
        rendered: messages and tools, in JSON types.

    Returns:
        Those given where no text holds one of the characters. Else the messages hold others in their place, which the
        tokenizer takes for them.
    """
    if not any(mark in text for text in (*texts_in(rendered), *keys_in(rendered)) for mark in MARKS):
        return tokenizer, rendered
    stand_ins = free_marks(rendered)
    back = str.maketrans(dict(zip(stand_ins, MARKS, strict=True)))
    other: Any = copy.copy(tokenizer)
    other.encode = lambda text, **options: tokenizer.encode(text.translate(back), **options)
    return other, _translated(rendered, str.maketrans(dict(zip(MARKS, stand_ins, strict=True))))


def free_marks(value: Any) -> tuple[str, str]:
    """Two characters that stand in no text or key of a JSON value."""
    used = set().union(*texts_in(value), *keys_in(value))
    free = (chr(code) for code in PRIVATE_USE if chr(code) not in used)
    return next(free), next(free)


def _translated(value: Any, table: dict[int, str]) -> Any:
    """A JSON value with other characters in its texts and keys."""
    if isinstance(value, str):
        return value.translate(table)
    if isinstance(value, dict):
        return {_translated(key, table): _translated(inner, table) for key, inner in value.items()}
    return [_translated(inner, table) for inner in value] if isinstance(value, list | tuple) else value
