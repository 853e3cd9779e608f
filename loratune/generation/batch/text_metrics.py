"""Compares an answer with its reference: exact match, ROUGE-L and BLEU."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from loratune.extras import required

with required("the comparison with expected answers", "metrics"), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # jieba 0.42 has invalid escapes, and imports pkg_resources
    import jieba
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
WORD = re.compile(r"[^\W_]+")
REASONING = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


class Words:
    """A word tokenizer for ROUGE, whose own tokenizer only knows the letters a to z.

    ASCII texts are tokenised as by the library. Chinese, which has no spaces, is segmented with jieba's dictionary.
    """

    def tokenize(self, text: str) -> list[str]:
        """Return the lower-case words of a text, without punctuation."""
        words: list[str] = []
        for word in WORD.findall(text.lower()):
            words += self._chinese.lcut(word) if HAN.search(word) else [word]
        return words

    @cached_property
    def _chinese(self) -> Any:
        """Load the package's own dictionary; jieba itself would read a cache in /tmp that anybody may have written."""
        cutter = jieba.Tokenizer()
        cutter.FREQ, cutter.total = cutter.gen_pfdict(cutter.get_dict_file())
        cutter.initialized = True
        return cutter


class TextMetrics:
    """Scores the answers of one file.

    Args:
        references: the reference answers; if any is Chinese, BLEU counts Chinese characters as words.
    """

    def __init__(self, references: Iterable[str]) -> None:
        self.bleu_tokenizer = "zh" if any(HAN.search(text) for text in references) else "13a"
        self._rouge = RougeScorer(["rougeL"], tokenizer=Words())
        # `force` disables the guess whether texts were tokenised before.
        self._row_bleu = BLEU(tokenize=self.bleu_tokenizer, effective_order=True, force=True)
        self._file_bleu = BLEU(tokenize=self.bleu_tokenizer, force=True)

    def of_row(self, answer: str, reference: str) -> dict[str, Any]:
        """Score one answer.

        Args:
            answer: the answer without reasoning.
            reference: the reference, with or without reasoning.

        Returns:
            exact_match: bool; rouge_l: F1, 0 to 1; bleu: 0 to 100.
        """
        expected = without_reasoning(reference)
        return {
            "exact_match": answer.strip() == expected.strip(),
            "rouge_l": round(self._rouge.score(expected, answer)["rougeL"].fmeasure, 6),
            "bleu": round(self._row_bleu.sentence_score(answer, [expected]).score, 4),
        }

    def of_file(self, scores: Sequence[dict[str, Any]], answers: list[str], references: list[str]) -> dict[str, float]:
        """Return means over the rows, and BLEU of the whole file, which is not the mean of the rows.

        Args:
            scores: results of `of_row`, at least one.
            answers: the answers of the same rows.
            references: the references of the same rows.
        """
        expected = [without_reasoning(text) for text in references]
        return {
            "exact_match": sum(score["exact_match"] for score in scores) / len(scores),
            "rouge_l": sum(score["rouge_l"] for score in scores) / len(scores),
            "bleu": self._file_bleu.corpus_score(answers, [expected]).score,
        }


def without_reasoning(text: str) -> str:
    """Return a text without the <think> block at its start, if there is one."""
    block = REASONING.match(text)
    return text[block.end() :] if block else text
