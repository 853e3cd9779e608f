"""Exact match, ROUGE-L and BLEU beside values computed by hand and by the libraries called directly."""

from __future__ import annotations

import builtins
import importlib
import marshal
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from loratune.errors import Exit, LoratuneError
from loratune.generation.batch.text_metrics import TextMetrics, Words, without_reasoning

ENGLISH = [
    ("The cat sat on the mat.", "A cat sat down on the mat!"),
    ("", "something"),
    ("GPU-days: 3.5 of 10", "3.5 GPU days"),
    ("no word in common", "nothing shared here at all"),
]


@pytest.mark.parametrize(("answer", "reference"), ENGLISH)
def test_rouge_l_of_english_is_the_library_s_own(answer: str, reference: str) -> None:
    expected = RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
    assert TextMetrics([reference]).of_row(answer, reference)["rouge_l"] == pytest.approx(expected, abs=1e-6)


def test_rouge_l_of_english_by_hand() -> None:
    # Three words of the answer's four stand in the reference's six, in order: P = 3/4, R = 3/6.
    score = TextMetrics([]).of_row("cat sat mat today", "the cat sat on the mat")
    assert score["rouge_l"] == pytest.approx(2 * 0.75 * 0.5 / 1.25, abs=1e-6)


def test_rouge_l_of_chinese_counts_words_of_the_dictionary() -> None:
    reference, answer = "我来到北京清华大学。", "我来到北京大学！"
    assert Words().tokenize(reference) == ["我", "来到", "北京", "清华大学"]
    assert Words().tokenize(answer) == ["我", "来到", "北京大学"]
    # Two words in common: P = 2/3, R = 2/4. The library's own words would be none at all.
    assert TextMetrics([reference]).of_row(answer, reference)["rouge_l"] == pytest.approx(4 / 7, abs=1e-6)
    assert RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure == 0


def test_words_of_other_scripts_count_too() -> None:
    assert Words().tokenize("Größe, naïve — Привет_мир 42") == ["größe", "naïve", "привет", "мир", "42"]
    assert TextMetrics([]).of_row("Привет, мир", "привет мир")["rouge_l"] == 1


def test_words_of_mixed_text_are_cut_by_their_script() -> None:
    assert Words().tokenize("我喜欢Python语言") == ["我", "喜欢", "python", "语言"]


@pytest.mark.parametrize(
    ("answer", "reference", "tokenizer"),
    [
        ("The cat sat on the mat today.", "The cat sat on the mat.", "13a"),
        ("我来到北京大学！", "我来到北京清华大学。", "zh"),
        ("", "something", "13a"),
    ],
)
def test_bleu_of_a_row_is_sacrebleu_s(answer: str, reference: str, tokenizer: str) -> None:
    metrics = TextMetrics([reference])
    assert metrics.bleu_tokenizer == tokenizer
    expected = sacrebleu.sentence_bleu(answer, [reference], tokenize=tokenizer).score
    assert metrics.of_row(answer, reference)["bleu"] == pytest.approx(expected, abs=1e-4)


def test_bleu_by_hand() -> None:
    # All n-grams of the answer stand in the reference; it is two words long and the reference three.
    assert TextMetrics([]).of_row("small dog", "small dog barks")["bleu"] == pytest.approx(
        100 * math.exp(1 - 3 / 2), abs=1e-4
    )


def test_a_file_s_bleu_is_that_of_the_whole_and_the_others_are_means() -> None:
    answers = ["我来到北京大学！", "The cat sat on the mat today.", "same same same same"]
    references = ["我来到北京清华大学。", "The cat sat on the mat.", "same same same same"]
    metrics = TextMetrics(references)
    rows = [metrics.of_row(*pair) for pair in zip(answers, references, strict=True)]
    found = metrics.of_file(rows, answers, references)
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(answers, [references], tokenize="zh").score)
    assert found["bleu"] != pytest.approx(sum(row["bleu"] for row in rows) / 3)
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert found["rouge_l"] == pytest.approx((4 / 7 + 12 / 13 + 1) / 3, abs=1e-6)


def test_an_answer_matches_but_for_blanks_around_it_and_the_reference_s_reasoning() -> None:
    metrics = TextMetrics([])
    assert metrics.of_row(" 42\n", "<think>\n6 times 7\n</think>\n\n42")["exact_match"] is True
    assert metrics.of_row("42", "42.")["exact_match"] is False
    assert metrics.of_row("Yes", "yes")["exact_match"] is False


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("<think>\na\n</think>\n\nb", "b"),
        ("a <think>b</think> c", "a <think>b</think> c"),
        ("<think>never closed", "<think>never closed"),
        ("<think></think>a</think>b", "a</think>b"),
    ],
)
def test_only_a_whole_block_at_the_beginning_is_reasoning(text: str, rest: str) -> None:
    assert without_reasoning(text) == rest


def test_jieba_s_cache_in_the_temporary_folder_is_neither_read_nor_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    planted = marshal.dumps(({"我来": 10**9, "我": 0}, 10**9))
    (tmp_path / "jieba.cache").write_bytes(planted)
    assert Words().tokenize("我来到北京") == ["我", "来到", "北京"]
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [planted]


@pytest.mark.parametrize("package", ["jieba", "rouge_score", "sacrebleu"])
def test_a_missing_package_is_one_message(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    genuine = builtins.__import__

    def refuse(name: str, *arguments: Any, **settings: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return genuine(name, *arguments, **settings)

    monkeypatch.delitem(sys.modules, "loratune.generation.batch.text_metrics")
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(LoratuneError, match=package) as caught:
        importlib.import_module("loratune.generation.batch.text_metrics")
    assert caught.value.exit_code == Exit.USAGE
    assert 'pip install "loratune[metrics]"' in str(caught.value)
