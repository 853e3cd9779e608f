"""Converts a model's tokenizer to the keys of a GGUF file.

A GGUF file contains tokens and merges, but refers to the pre-tokenizer only by name. A program that does not know the
name, or associates another pre-tokenizer with it, silently tokenises wrongly. Only tokenizers whose pre-tokenizer is
exactly that of a known name are therefore supported.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import TokenType

from loratune.data.encoding.encoder import Encoder
from loratune.delivery.export.gguf.refusal import NotForGgufError
from loratune.delivery.export.gguf.scored_vocabulary import is_scored, scored_tokens
from loratune.errors import Exit, LoratuneError
from loratune.model.tokenizer import load_tokenizer
from loratune.plain_files import read_json_object
from loratune.runs.opening import merged_prompt

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKED_WORDS = (  # with combining marks, as \p{M} matches them
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_CASED_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ONLY_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


SPLITTINGS: dict[str, list[dict[str, Any]]] = {
    "qwen35": [_split(_MARKED_WORDS), _ONLY_BYTES],
    "qwen2": [_split(_WORDS + r"\p{N}" + _REST), _ONLY_BYTES],
    "llama-bpe": [_split(_WORDS + r"\p{N}{1,3}" + _REST), _ONLY_BYTES],
    "dbrx": [_split(_WORDS + r"\p{N}{1,3}" + _REST), _ONLY_BYTES],
    "gpt-4o": [_split(_CASED_WORDS), _ONLY_BYTES],
    "smollm": [{"type": "Digits", "individual_digits": True}, _GPT2],
    "gpt-2": [_GPT2],
}

IGNORING_MERGES = ("llama-bpe",)
"""Names with which programs take a word that is a token without merging."""


def describe_vocabulary(model: Path, vocab_size: int) -> dict[str, Any]:
    """Return the tokenizer's keys and values: strings, integers, a bool, lists of strings and of integers.

    Args:
        model: folder with tokenizer.json and related files.
        vocab_size: rows of the model's embedding; ids without a token become unused tokens.

    Raises:
        LoratuneError: GGUF does not support the tokenizer, or it does not match the model.
    """
    path = model / "tokenizer.json"
    state = read_json_object(path)
    if is_scored(state):
        tokens, kinds = _list_tokens(path, state, vocab_size)
        scored = scored_tokens(state, tokens, kinds, lambda reason: _unknown(path, reason))
        return scored | _describe_special_tokens(model)
    pre = _find_splitting(path, state)
    tokens, kinds = _list_tokens(path, state, vocab_size)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]],
        **_describe_special_tokens(model),
    }


def _find_splitting(path: Path, state: dict[str, Any]) -> str:
    """Return the name of the pre-tokenizer, after checking that everything else is GGUF's byte-level BPE."""
    model = state["model"]
    if (
        model.get("type") != "BPE"
        or model.get("byte_fallback")
        or (state.get("decoder") or {}).get("type") != "ByteLevel"
    ):
        raise _unknown(path, f"it is no byte-level BPE but {model.get('type')}, perhaps SentencePiece's")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise _unknown(path, f"{option} is {model[option]!r}")
    normalizer = state.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}):  # programs expect text in NFC
        raise _unknown(path, f"normalizer {json.dumps(normalizer)}")
    splitting = state.get("pre_tokenizer") or {}
    steps = splitting.get("pretokenizers", [splitting])
    steps = [_usual_step(step) for step in steps]
    names = [name for name, known in SPLITTINGS.items() if steps == known]
    if not names:
        raise _unknown(path, f"pre_tokenizer {json.dumps(steps, ensure_ascii=False)}")
    ignores = bool(model.get("ignore_merges"))
    fitting = [name for name in names if ignores == (name in IGNORING_MERGES)]
    if not fitting:
        raise _unknown(path, f"ignore_merges is {model.get('ignore_merges')} with the splitting of {names[0]}")
    return fitting[0]


def _usual_step(step: dict[str, Any]) -> dict[str, Any]:
    """Return a step of a pre-tokenizer as SPLITTINGS has it."""
    usual = {key: value for key, value in step.items() if key != "trim_offsets"}
    if usual.get("type") == "Split" and (usual["behavior"], usual["invert"]) == ("Removed", True):
        usual |= {"behavior": "Isolated", "invert": False}  # the same for the known patterns, which match any text
    return usual


def _unknown(path: Path, what: str) -> NotForGgufError:
    return NotForGgufError(
        f"{path}: {what}; such a tokenizer cannot be exported to GGUF here: try llama.cpp's convert_hf_to_gguf.py",
        Exit.MODEL,
    )


def _list_tokens(path: Path, state: dict[str, Any], vocab_size: int) -> tuple[list[str], list[TokenType]]:
    tokens = [f"[PAD{place}]" for place in range(vocab_size)]
    kinds = [TokenType.UNUSED] * vocab_size
    named = [(place, token, TokenType.NORMAL) for token, place in state["model"]["vocab"].items()]
    for added in state.get("added_tokens", []):
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            raise _unknown(path, f"added token {added['content']!r} takes the space around it or asks for whole words")
        named.append((added["id"], added["content"], TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED))
    for place, token, kind in named:
        if place >= vocab_size:
            raise LoratuneError(
                f"{path}: token {token!r} has id {place}, but the model has only {vocab_size} embeddings", Exit.MODEL
            )
        tokens[place], kinds[place] = token, kind
    if len(set(tokens)) != vocab_size:
        raise _unknown(path, "two ids share one token")
    return tokens, kinds


def _describe_special_tokens(model: Path) -> dict[str, Any]:
    """Return the keys of special tokens and of the chat template.

    Programs add the BOS token if the prompts of training started with it; in turn they omit it from the template's
    text.
    """
    tokenizer = load_tokenizer(model)
    templates: dict[str, str | list[str]] = {}
    if tokenizer.chat_template is None:
        first, end = tokenizer("").input_ids, tokenizer.eos_token_id
    else:
        encoder = Encoder(tokenizer, merged_prompt(model))
        first, end = encoder.prompt_ids([{"role": "user", "content": "?"}])[:1], encoder.end_id
        templates["tokenizer.chat_template"] = encoder.template
        if encoder.tool_template != encoder.template:
            templates |= {
                "tokenizer.chat_template.tool_use": encoder.tool_template,
                "tokenizer.chat_templates": ["tool_use"],
            }
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": end,
        "eot": end,
        "padding": tokenizer.pad_token_id,
        "unknown": tokenizer.unk_token_id,
    }
    keys: dict[str, Any] = {
        f"tokenizer.ggml.{name}_token_id": place for name, place in ids.items() if place is not None
    }
    keys["tokenizer.ggml.add_bos_token"] = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
    return keys | templates
