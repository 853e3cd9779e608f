"""Converts a tokenizer in SentencePiece's form, as Gemma's, to keys of a GGUF file.

tokenizer.json has a rank for each pair of tokens that is merged. GGUF has a score for each token, and programs merge
any two tokens that make one, those with the highest score first. Only where both do the same is it converted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from gguf import TokenType

NOT_ADDED = (TokenType.NORMAL, TokenType.BYTE, TokenType.UNKNOWN)
"""Types of tokens that merges may make, rather than added ones."""
SPACE = "▁"
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
NORMALIZER = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
# It splits at spaces, of which the normalizer leaves none.
SPLITTING = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def is_scored(state: dict[str, Any]) -> bool:
    """Return whether a tokenizer.json is of Gemma's kind: BPE on characters, with bytes for unknown ones."""
    return (
        state["model"].get("type") == "BPE"
        and bool(state["model"].get("byte_fallback"))
        and not state["model"].get("ignore_merges")
        and state.get("normalizer") == NORMALIZER
        and state.get("pre_tokenizer") in (None, SPLITTING)
    )


def scored_tokens(
    state: dict[str, Any], tokens: list[str], kinds: list[TokenType], refuse: Callable[[str], Exception]
) -> dict[str, Any]:
    """Return the keys of a vocabulary with a score per token.

    Args:
        state: contents of tokenizer.json, for which `is_scored`.
        tokens: text of each id.
        kinds: type of each id, except that bytes and the unknown token are among the normal ones.
        refuse: makes an error of a reason.

    Raises:
        Exception: programs would merge other tokens than the tokenizer; made by `refuse`.
    """
    merges = [tuple(one.split(" ") if isinstance(one, str) else one) for one in state["model"]["merges"]]
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    in_order = [ranks[left + right] for left, right in merges]
    if in_order != sorted(in_order):
        raise refuse("merges that make one token have ranks apart")
    unknown = state["model"].get("unk_token")
    kinds = [
        TokenType.BYTE if BYTE_TOKEN.fullmatch(token) else TokenType.UNKNOWN if token == unknown else kind
        for token, kind in zip(tokens, kinds, strict=True)
    ]
    plain = {token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.NORMAL}
    known = set(merges)
    for token in plain:
        for place in range(1, len(token)):
            pair = (token[:place], token[place:])
            if plain.issuperset(pair) and pair not in known:
                raise refuse(f"{pair[0]!r} and {pair[1]!r} are not merged to the token {token!r}")
    # Programs find a token that was added by the text before spaces are replaced.
    texts = [
        token.replace(SPACE, " ") if kind not in NOT_ADDED else token for token, kind in zip(tokens, kinds, strict=True)
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": [-float(ranks.get(token, 0)) for token in tokens],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_space_prefix": False,
    }
