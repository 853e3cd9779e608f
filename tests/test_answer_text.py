"""Streamed pieces put together are what the tokenizer says to all ids at once, cut at stop texts, reasoning apart."""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from loratune.engine.text import MOST_HELD, TextStream
from tests.conftest import TINY_QWEN


@cache
def byte_level() -> Any:
    return AutoTokenizer.from_pretrained(TINY_QWEN)


@cache
def with_word_marks() -> Any:
    """As SentencePiece writes: a word begins with ▁, which is no blank at the start of a text."""
    vocabulary = {
        token: number for number, token in enumerate(["▁Hello", "▁world", "s", "!", "▁", "<0xE4>", "<0xBD>", "<0xA0>"])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def streamed(tokenizer: Any, ids: list[int], **settings: Any) -> tuple[str, str, list[str]]:
    """Text, reasoning, and the pieces of text."""
    stream = TextStream(tokenizer, **settings)
    parts = []
    for token in ids:
        parts.append(stream.push(token))
        if stream.stopped:
            break
    parts.append(stream.finish())
    return "".join(p.text for p in parts), "".join(p.reasoning for p in parts), [p.text for p in parts]


@cache
def parts_of_characters() -> list[int]:
    return [token for token in range(len(byte_level())) if "\ufffd" in byte_level().decode([token])]


IDS = st.integers(0, len(byte_level()) - 1) | st.sampled_from(parts_of_characters())


@settings(max_examples=300, deadline=None)
@given(st.lists(IDS, max_size=30) | st.lists(st.sampled_from(parts_of_characters()), max_size=100))
def test_any_ids_give_the_tokenizer_s_text_and_no_piece_is_taken_back(ids: list[int]) -> None:
    tokenizer = byte_level()
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    text, reasoning, pieces = streamed(tokenizer, ids)
    assume("<think>" not in whole)
    assert (text, reasoning) == (whole, "")
    told = ""
    for count, piece in enumerate(pieces[:-1], 1):
        told += piece
        known = tokenizer.decode(ids[:count], skip_special_tokens=True)
        assert known.startswith(told)
        assert not (piece and known == told and known.endswith("\ufffd")), "it may become a character"


@settings(max_examples=100, deadline=None)
@given(st.text("你好🙂𠮷a\ufffd", max_size=40))
def test_a_character_in_many_tokens_comes_whole(text: str) -> None:
    tokenizer = byte_level()
    single = {bytes([byte]): tokenizer.convert_tokens_to_ids(char) for byte, char in bytes_to_unicode().items()}
    ids = [single[bytes([byte])] for byte in text.encode()]
    whole, _, pieces = streamed(tokenizer, ids)
    assert whole == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.sampled_from([[0], [1], [2], [3], [4], [5, 6, 7]]), max_size=12))
def test_characters_in_bytes_follow_each_other(runs: list[list[int]]) -> None:
    """Where the whole run of bytes counts, as in SentencePiece's fallback."""
    tokenizer = with_word_marks()
    ids = [token for run in runs for token in run]
    whole, _, pieces = streamed(tokenizer, ids)
    assert whole == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_never_become_characters_are_not_decoded_again_and_again() -> None:
    tokenizer, longest = byte_level(), 0
    decode = tokenizer.decode

    class Counting:
        def decode(self, ids: list[int], **settings: Any) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return str(decode(ids, **settings))

    ids = parts_of_characters()[:1] * 500
    assert streamed(Counting(), ids)[0] == decode(ids)
    assert longest <= 2 * MOST_HELD


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_any_text_comes_back_and_no_piece_ends_within_a_character(text: str) -> None:
    tokenizer = byte_level()
    ids = tokenizer(text, split_special_tokens=True).input_ids
    whole, _, pieces = streamed(tokenizer, ids)
    assert whole == unicodedata.normalize("NFC", text)  # as the tokenizer writes it
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, 4), max_size=12))
def test_blanks_between_words_stay(ids: list[int]) -> None:
    tokenizer = with_word_marks()
    assert streamed(tokenizer, ids)[0] == tokenizer.decode(ids)


def test_most_pieces_come_at_once() -> None:
    ids = byte_level()("你好, I am a model. 🙂!").input_ids
    stream = TextStream(byte_level())
    told = ""
    for count, token in enumerate(ids, 1):
        told += stream.push(token).text
        known = byte_level().decode(ids[:count])
        assert known.endswith("\ufffd") or told == known


@settings(max_examples=150, deadline=None)
@given(st.text("ab\n<", max_size=25), st.lists(st.text("ab\n<", min_size=1, max_size=4), max_size=3))
@pytest.mark.parametrize("piece", [1, 3, 100])
def test_an_answer_ends_before_its_first_stop_text(piece: int, text: str, stop: list[str]) -> None:
    tokenizer = byte_level()
    parts = [text[start : start + piece] for start in range(0, len(text), piece)]
    ids = [token for part in parts for token in tokenizer(part).input_ids]
    # The first one to be complete; of several that end at one place the longest.
    found = min(((text.find(one) + len(one), text.find(one)) for one in stop if one in text), default=(0, len(text)))
    whole, _, _ = streamed(tokenizer, ids, stop=stop)
    assert whole == text[: found[1]]


@pytest.mark.parametrize("piece", [1, 3, 100])
@pytest.mark.parametrize(
    ("said", "in_reasoning", "text", "reasoning"),
    [
        ("<think>\nsum\n</think>\n\n5", False, "5", "sum\n"),
        ("  <think>a</think>b", False, "b", "a"),
        ("<think></think>b", False, "b", ""),
        ("sum</think>\n5", True, "5", "sum"),
        ("never done", True, "", "never done"),
        ("5 <think>6</think>", False, "5 <think>6</think>", ""),
        ("<thin ice", False, "<thin ice", ""),
        ("<thin", False, "<thin", ""),
        ("<think>a </thin b</think>c</think>d", False, "c</think>d", "a </thin b"),
        ("\n hi", False, "\n hi", ""),
    ],
)
def test_reasoning_is_told_apart(piece: int, said: str, in_reasoning: bool, text: str, reasoning: str) -> None:
    tokenizer = byte_level()
    parts = [said[start : start + piece] for start in range(0, len(said), piece)]
    ids = [token for part in parts for token in tokenizer(part, split_special_tokens=True).input_ids]
    assert streamed(tokenizer, ids, in_reasoning=in_reasoning)[:2] == (text, reasoning)


def test_a_stop_text_counts_in_the_reasoning_too() -> None:
    ids = byte_level()("<think>one END two</think>x").input_ids
    assert streamed(byte_level(), ids, stop=["END"])[:2] == ("", "one ")
