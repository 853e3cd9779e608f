"""Loads the base model's tokenizer."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from loratune.errors import Exit, LoratuneError, first_line_of
from loratune.model.config import default_config
from loratune.model.files import CONFIG
from loratune.protocols import Tokenizer


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load a tokenizer, configured so that no text of a row can become a control token.

    Raises:
        LoratuneError: its files are damaged.
    """
    # Of the values, none counts; the model's code, which they are checked with, takes seconds to import.
    config = default_config(folder) if (folder / CONFIG).is_file() else None
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
            folder, config=config, local_files_only=True, trust_remote_code=False
        )
        tokenizer("a text")  # also compares the length with model_max_length
    except Exception as error:  # the tokenizers library only raises Exception
        raise LoratuneError(
            f"{folder}: the tokenizer cannot be read: {first_line_of(error)}; fetch its files again", Exit.MODEL
        ) from error
    tokenizer.chat_control_tokens = [token for token in tokenizer.added_tokens_encoder if not token.isspace()]
    return tokenizer


def set_pad_token(tokenizer: Tokenizer, end_ids: set[int | None]) -> None:
    """Choose a pad token that does not end answers; padding is masked in loss and attention either way."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    named_pad = [token for token in special if "pad" in token]
    for token in [tokenizer.pad_token, *named_pad, *special, tokenizer.convert_ids_to_tokens(0)]:
        if token is not None and tokenizer.convert_tokens_to_ids(token) not in end_ids:
            tokenizer.pad_token = token
            return
