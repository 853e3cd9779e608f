"""Remembered pieces against the library: the same ids for any text, of any tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import TINY_QWEN
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from loratune.data.encoding import tokens
from loratune.data.encoding.tokens import TokenMemo

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


def whole_lines() -> Any:
    split = pre_tokenizers.Split(Regex(r"\n"), "isolated")
    return wrapped(trained_bpe(pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])))


def dots_in_words() -> Any:
    """Like domain names: a full stop between letters ends no word."""
    split = pre_tokenizers.Split(Regex(r"\w+(?:\.\w+)*|\s+|."), "isolated")
    return wrapped(trained_bpe(pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])))


def looking_behind() -> Any:
    split = pre_tokenizers.Split(Regex(r"(?<=q) |\w+|\s+|."), "isolated")
    return wrapped(trained_bpe(pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])))


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


CUT = [qwen, gpt2, gpt2_composing, dots_in_words]
WHOLE = [
    gpt2_with_leading_space, whole_lines, looking_behind, compatibility_forms, stripping_tokens, metaspace, word_pieces,
    unigram,
]  # fmt: skip


@pytest.fixture(scope="module")
def memo_of() -> Callable[[Callable[[], Any]], tuple[TokenMemo, Any]]:
    """Each tokenizer with one memory, which all its texts fill."""
    made: dict[Any, tuple[TokenMemo, Any]] = {}

    def make(build: Callable[[], Any]) -> tuple[TokenMemo, Any]:
        if build not in made:
            tokenizer = build()
            made[build] = (TokenMemo(tokenizer), tokenizer)
        return made[build]

    return make


def ids_of(memo: TokenMemo, text: str, keep_special: bool) -> list[int]:
    (ids,) = memo.all_ids([text], keep_special)
    return ids.tolist()


def library_ids(tokenizer: Any, text: str, keep_special: bool) -> list[int]:
    options = {} if keep_special else {"split_special_tokens": True}
    return list(tokenizer(text, add_special_tokens=False, **options).input_ids)


@pytest.mark.parametrize("build", [*CUT, *WHOLE], ids=lambda build: build.__name__)
def test_only_texts_of_words_that_stand_for_themselves_are_cut(memo_of: Any, build: Callable[[], Any]) -> None:
    assert memo_of(build)[0].is_in_use is (build in CUT)


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


def lists(memo: TokenMemo, texts: list[str], keep_special: bool) -> list[list[int]]:
    return [ids.tolist() for ids in memo.all_ids(texts, keep_special)]


@settings(deadline=None, max_examples=150)
@pytest.mark.parametrize("build", [*CUT, *WHOLE], ids=lambda build: build.__name__)
@given(texts=st.lists(TEXTS, max_size=4), keep_special=st.booleans())
def test_any_text_has_the_library_s_ids(
    memo_of: Any, build: Callable[[], Any], texts: list[str], keep_special: bool
) -> None:
    memo, tokenizer = memo_of(build)
    expected = [library_ids(tokenizer, text, keep_special) for text in texts]
    assert lists(memo, texts, keep_special) == expected
    assert [ids_of(memo, text, keep_special) for text in texts] == expected


def test_what_a_tokenizer_was_last_asked_for_makes_no_difference(memo_of: Any) -> None:
    memo, tokenizer = TokenMemo(qwen()), qwen()
    memo._tokenizer("a b", padding="max_length", truncation=True, max_length=3)
    text = "one two three four five <|im_end|> six"
    for keep_special in (False, True):
        assert ids_of(memo, text, keep_special) == library_ids(tokenizer, text, keep_special)
    assert library_ids(memo._tokenizer, text, True) == library_ids(tokenizer, text, True)


def test_the_lists_given_out_are_the_caller_s(memo_of: Any) -> None:
    memo = TokenMemo(qwen())
    first, again = memo.all_ids(["a word", "a word"], keep_special=True)
    first.append(0)
    assert again.tolist() == ids_of(memo, "a word", keep_special=True) == library_ids(qwen(), "a word", True)


def test_only_so_many_short_pieces_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    memo, tokenizer = TokenMemo(qwen()), qwen()
    before = len(memo._known)
    monkeypatch.setattr(tokens, "MOST_PIECES", before + 3)
    texts = ["aa bb cc dd ee ff", "gg hh ii", "z" * 100]
    assert lists(memo, texts, True) == [library_ids(tokenizer, text, True) for text in texts]
    assert len(memo._known) == before + 3
    assert "z" * 100 not in memo._known
    assert lists(memo, texts, True) == [library_ids(tokenizer, text, True) for text in texts]


def test_no_texts_are_no_ids() -> None:
    assert TokenMemo(qwen()).all_ids([], keep_special=True) == []
    assert TokenMemo(word_pieces()).all_ids([], keep_special=False) == []
