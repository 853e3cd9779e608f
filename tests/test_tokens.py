"""Many texts at a time have the ids that each has alone, with any tokenizer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
from conftest import TINY_QWEN
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from loratune.data.encoding.tokens import all_ids

CORPUS = [
    "Hello, world! It's a test: don't (really) worry.\n\nThe end; 12 apples, 3 pears.",
    "你好，世界。 café naïve",
] * 3
BYTES = pre_tokenizers.ByteLevel.alphabet()
SPECIAL = ["<|end|>", "<|a<think>|>"]
ORDINARY = ["<think>", "</think>", "<think"]


def wrapped(backend: Tokenizer, **added: Any) -> PreTrainedTokenizerFast:
    """A transformers tokenizer with control tokens that overlap and hold one another."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=AddedToken(SPECIAL[0], normalized=False))
    options = {"normalized": False} | added
    tokenizer.add_tokens([AddedToken(SPECIAL[1], special=True, **options)], special_tokens=True)
    tokenizer.add_tokens([AddedToken(text, special=False, **options) for text in ORDINARY])
    return tokenizer


def trained_bpe(pre_tokenizer: Any, normalizer: Any = None, **options: Any) -> Tokenizer:
    backend = Tokenizer(models.BPE(**options))
    backend.pre_tokenizer = pre_tokenizer
    if normalizer:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=BYTES, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.decoder = decoders.ByteLevel()
    return backend


def qwen() -> Any:
    return AutoTokenizer.from_pretrained(TINY_QWEN)


def gpt2() -> Any:
    return wrapped(trained_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)))


def gpt2_composing() -> Any:
    return wrapped(trained_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC()))


def gpt2_with_leading_space() -> Any:
    return wrapped(trained_bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)))


def compatibility_forms() -> Any:
    return wrapped(trained_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFKC()))


def stripping_tokens() -> Any:
    return wrapped(trained_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)), lstrip=True, rstrip=True)


def metaspace() -> Any:
    return wrapped(trained_bpe(pre_tokenizers.Metaspace(), unk_token=None))


def word_pieces() -> Any:
    backend = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    )
    return wrapped(backend)


def unigram() -> Any:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return wrapped(backend)


def without_rust() -> Any:
    """As a tokenizer that is no part of the library tokenizers."""
    tokenizer = qwen()
    tokenizer.__class__ = type("Slow", (type(tokenizer),), {"is_fast": False})
    return tokenizer


KINDS = [
    qwen, gpt2, gpt2_composing, gpt2_with_leading_space, compatibility_forms, stripping_tokens, metaspace, word_pieces,
    unigram, without_rust,
]  # fmt: skip


def library_ids(tokenizer: Any, text: str, keep_special: bool) -> list[int]:
    options = {} if keep_special else {"split_special_tokens": True}
    return list(tokenizer(text, add_special_tokens=False, **options).input_ids)


WORDS = [
    "Hello",
    " world",
    "don't",
    "I'M",
    " it's",
    "a",
    "word.word",
    "3rd",
    "x=",
    "=\u0338",
    "cafe\u0301",
    "\u212a",
    "你好，",
    "。",
]
BLANKS = [
    " ",
    "  ",
    "\n",
    "\n\n",
    " \n ",
    "\r\n",
    "\t",
    "\u00a0",
    "\u2028",
    "'",
    "''",
    "'s",
    ".",
    ",",
    ")(",
    "\u0301",
    "😀",
    "👍🏽",
]
CONTROL = ["<|im_start|>", "<|im_end|>", "<tool_call>", "<|", "think>", *SPECIAL, *ORDINARY]
CHARACTERS = st.characters(exclude_categories=["Cs"])
TEXTS = st.lists(st.sampled_from([*WORDS, *BLANKS, *CONTROL]) | st.text(CHARACTERS, max_size=4), max_size=14).map(
    "".join
)


@functools.cache
def made(build: Callable[[], Any]) -> Any:
    return build()


@settings(deadline=None, max_examples=100)
@pytest.mark.parametrize("build", KINDS, ids=lambda build: build.__name__)
@given(texts=st.lists(TEXTS, max_size=4), keep_special=st.booleans())
def test_any_text_has_the_ids_that_the_tokenizer_gives_it_alone(
    build: Callable[[], Any], texts: list[str], keep_special: bool
) -> None:
    tokenizer = made(build)
    expected = [library_ids(tokenizer, text, keep_special) for text in texts]
    assert [ids.tolist() for ids in all_ids(tokenizer, texts, keep_special)] == expected


@pytest.mark.parametrize("keep_special", [False, True])
def test_what_a_tokenizer_was_last_asked_for_makes_no_difference(keep_special: bool) -> None:
    asked, fresh = qwen(), qwen()
    asked("a b", padding="max_length", truncation=True, max_length=3)
    text = "one two three four five <|im_end|> six"
    expected = library_ids(fresh, text, keep_special)
    assert [ids.tolist() for ids in all_ids(asked, [text, text], keep_special)] == [expected] * 2
    assert library_ids(asked, text, True) == library_ids(fresh, text, True)


def test_a_tokenizer_that_takes_special_tokens_for_text_does_so_here_too() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_QWEN, split_special_tokens=True)
    expected = library_ids(tokenizer, "a<|im_end|>", True)
    assert tokenizer.eos_token_id not in expected
    assert all_ids(tokenizer, ["a<|im_end|>"], True)[0].tolist() == expected
