"""Texts → token ids, as a tokenizer gives them for each, many at a time."""

from __future__ import annotations

import unicodedata
from array import array
from collections.abc import Sequence
from typing import Literal, TypeAlias

from loratune.protocols import Tokenizer

Ids: TypeAlias = "array[int]"
"""Token ids packed as int32: a Python object for each would cost more than everything else here."""

NormalForm: TypeAlias = Literal["NFC", "NFKC", "NFD", "NFKD"]
NORMAL_FORMS: tuple[NormalForm, ...] = ("NFC", "NFKC", "NFD", "NFKD")
UNNORMALIZED = "e\u0301\u00e9\ufb01"
"""A text that each normal form writes differently."""


def all_ids(tokenizer: Tokenizer, texts: Sequence[str], keep_special: bool) -> list[Ids]:
    """The ids of texts, without any that the tokenizer would set around them.

    Args:
        tokenizer: a transformers tokenizer.
        texts: any.
        keep_special: whether special tokens in them become tokens. If not they are encoded like words; of added tokens
            only ordinary ones stay whole then.
    """
    if not texts:
        return []
    splits_special = tokenizer.split_special_tokens if keep_special else True
    if not getattr(tokenizer, "is_fast", False):
        called = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=splits_special)
        return [array("i", ids) for ids in called.input_ids]
    # The call of the tokenizer itself, which begins with this, looks up where each token stands, too, which takes as
    # long again.
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = splits_special
    return [array("i", encoding.ids) for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def normal_form(tokenizer: Tokenizer) -> NormalForm | None:
    """Return the Unicode normal form that a tokenizer applies; None if it applies none, or changes texts otherwise."""
    ids = tokenizer(UNNORMALIZED, add_special_tokens=False).input_ids
    read = str(tokenizer.decode(ids)).strip()
    if read == UNNORMALIZED:
        return None
    return next((form for form in NORMAL_FORMS if read == unicodedata.normalize(form, UNNORMALIZED)), None)
