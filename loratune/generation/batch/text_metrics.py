"""How near an answer comes to the one that its row holds: exact match, ROUGE-L and BLEU."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from loratune.extras import required

with required("--metrics", "metrics"), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # jieba 0.42 has odd escapes, and asks for setuptools' pkg_resources
    import jieba
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics.bleu import BLEU

HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
WORD = re.compile(r"[^\W_]+")
REASONING = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


class Words:
    """Cuts texts into words for ROUGE, whose own way knows the letters a to z only.

    ASCII texts come out as the library would have it. Chinese, which has no spaces, is cut by jieba's dictionary.
    """

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, in small letters, without punctuation."""
        words: list[str] = []
        for word in WORD.findall(text.lower()):
            words += self._chinese.lcut(word) if HAN.search(word) else [word]
        return words

    @cached_property
    def _chinese(self) -> Any:
        """Read from the package's dictionary; jieba itself would read a cache that anybody may have put into /tmp."""
        cutter = jieba.Tokenizer()
        cutter.FREQ, cutter.total = cutter.gen_pfdict(cutter.get_dict_file())
        cutter.initialized = True
        return cutter


class TextMetrics:
    """Scores answers of one file.

    Args:
        references: the answers that its rows hold; if any is Chinese, BLEU counts Chinese characters as words.
    """

    def __init__(self, references: Iterable[str]) -> None:
        self.bleu_tokenizer = "zh" if any(HAN.search(text) for text in references) else "13a"
        self._rouge = RougeScorer(["rougeL"], tokenizer=Words())
        # `force` only keeps it from guessing whether texts have been tokenised before.
        self._row_bleu = BLEU(tokenize=self.bleu_tokenizer, effective_order=True, force=True)
        self._file_bleu = BLEU(tokenize=self.bleu_tokenizer, force=True)

    def of_row(self, answer: str, reference: str) -> dict[str, Any]:
        """Scores of one answer.

        Args:
            answer: without reasoning.
            reference: with or without.

        Returns:
            exact_match, true or false; rouge_l, F1 from 0 to 1; bleu from 0 to 100.
        """
        expected = without_reasoning(reference)
        return {
            "exact_match": answer.strip() == expected.strip(),
            "rouge_l": round(self._rouge.score(expected, answer)["rougeL"].fmeasure, 6),
            "bleu": round(self._row_bleu.sentence_score(answer, [expected]).score, 4),
        }

    def of_file(self, scores: Sequence[dict[str, Any]], answers: list[str], references: list[str]) -> dict[str, float]:
        """Means over rows, and BLEU over the whole, which is no mean of rows.

        Args:
            scores: what of_row gave, at least one.
            answers: of the same rows.
            references: of the same rows.
        """
        expected = [without_reasoning(text) for text in references]
        return {
            "exact_match": sum(score["exact_match"] for score in scores) / len(scores),
            "rouge_l": sum(score["rouge_l"] for score in scores) / len(scores),
            "bleu": self._file_bleu.corpus_score(answers, [expected]).score,
        }


def without_reasoning(text: str) -> str:
    """What follows the <think> block that a text begins with, if it does."""
    block = REASONING.match(text)
    return text[block.end() :] if block else text
