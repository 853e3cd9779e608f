"""The error for what loratune cannot write as GGUF; other modules of this package need the package gguf."""

from __future__ import annotations

from loratune.errors import Exit, LoratuneError


class NotForGgufError(LoratuneError):
    """A model or tokenizer that loratune cannot represent in GGUF; llama.cpp's own converter may."""


def not_for_gguf(where: object, what: str) -> NotForGgufError:
    """The error for something in a file of the model."""
    return NotForGgufError(
        f"{where}: {what} cannot be exported to GGUF here; try llama.cpp's convert_hf_to_gguf.py", Exit.MODEL
    )
