"""Compares two models on the bundled texts: what a fine-tune has forgotten."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from loratune.engine.engine import Engine
from loratune.evaluation.result import ChangedAnswer, GeneralAnswers, GeneralText
from loratune.evaluation.statistics import compare
from loratune.generation.batch.answer_file import AnswerFile
from loratune.generation.batch.row_answers import Side
from loratune.generation.general_texts import load_instructions, load_passages, read_passages

ANSWER_TOKENS = 64
"""Limit of an answer to an instruction: language and refusals show at its beginning."""
CHINESE_SHARE = 0.2
"""Share of Han characters among letters from which a text counts as Chinese: one takes the place of several letters."""
FEWEST_LETTERS = 4
LETTER = re.compile(r"[^\W\d_]")
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
REFUSAL = re.compile(
    r"(?:i['’]?m sorry|i am sorry|sorry,|i apologi[sz]e|i can(?:no|['’])t|i(?:['’]m| am) (?:not able|unable)"
    r"|as an ai\b[^.]{0,80}\b(?:can(?:no|['’])t|unable|not able|do not|don['’]t)"
    r"|(?:很|非常|十分)?(?:抱歉|对不起)|我(?:无法|不能|没有办法)|作为(?:一个|一名)?(?:人工智能|AI)[^。]{0,40}(?:无法|不能|没有))",
    re.IGNORECASE,
)


def general(side: Side) -> Side:
    """Return the side under whose name a side's answers to the instructions are kept."""
    return replace(side, name=f"general {side.name}".strip())


def passage_kind(side: Side) -> str:
    """Return the kind of a side's passage losses in the file of the results."""
    return f"{side.name} passage".strip()


def measure_passages(engine: Engine, side: Side, file: AnswerFile) -> None:
    """Add the losses of a side's adapter and of its base on the passages that the file lacks."""
    todo = [one for one in load_passages() if not file.has(one.number, passage_kind(side))]
    for passage, found in read_passages(engine, str(side.adapter), todo):
        file.add(passage.number, passage_kind(side), vars(found))


def compare_passages(file: AnswerFile, tuned: Side, baseline: Side) -> dict[str, GeneralText]:
    """Compare the losses on the passages of each language.

    Both are divided by the baseline's number of tokens, so that models with other tokenizers can be compared.

    Args:
        file: holds the losses.
        tuned: the evaluated adapter.
        baseline: its base, or another adapter.
    """
    by_language: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for passage in load_passages():
        own = file.read(passage.number, passage_kind(tuned))
        other = file.read(passage.number, passage_kind(baseline)) if baseline.use_adapter else _of_base(own)
        if own["tokens"] and other["tokens"]:
            by_language.setdefault(passage.language, []).append((own, other))
    return {language: _general_text(pairs) for language, pairs in by_language.items()}


def _of_base(known: Mapping[str, Any]) -> dict[str, Any]:
    return {"tokens": known["tokens"], "loss": known["base_loss"], "kl": 0.0}


def _general_text(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> GeneralText:
    tokens = sum(other["tokens"] for _, other in pairs)
    return GeneralText(
        passages=len(pairs),
        tokens=tokens,
        loss=compare(
            [other["loss"] / other["tokens"] for _, other in pairs],
            [own["loss"] / other["tokens"] for own, other in pairs],
            is_loss=True,
        ),
        kl=sum(own["kl"] for own, _ in pairs) / sum(own["tokens"] for own, _ in pairs),
        baseline_kl=sum(other["kl"] for _, other in pairs) / tokens,
    )


def compare_answers(file: AnswerFile, tuned: Side, baseline: Side) -> GeneralAnswers:
    """Compare the answers to the bundled instructions.

    Args:
        file: holds the answers.
        tuned: the evaluated adapter's answers.
        baseline: those of the model that it is compared with.
    """
    changed, lengths = list[ChangedAnswer](), list[float]()
    instructions = load_instructions()
    for one in instructions:
        own, other = (file.read(one.row.number, general(side).answer)["answer"] for side in (tuned, baseline))
        question = str(one.row.fields["instruction"])
        changed += (ChangedAnswer(question, change, other, own) for change in changes(own, other))
        if other.strip():
            lengths.append(len(own.strip()) / len(other.strip()))
    kinds = [one.change for one in changed]
    return GeneralAnswers(
        asked=len(instructions),
        language=kinds.count("language"),
        refusal=kinds.count("refusal"),
        empty=kinds.count("empty"),
        shorter=sum(length < 0.5 for length in lengths),
        longer=sum(length > 2 for length in lengths),
        changed=tuple(changed),
    )


def changes(tuned: str, baseline: str) -> Iterator[str]:
    """Yield in what an answer differs from the baseline's: `empty`, `language`, `refusal`."""
    if baseline.strip() and not tuned.strip():
        yield "empty"
    languages = language_of(tuned), language_of(baseline)
    if None not in languages and languages[0] != languages[1]:
        yield "language"
    if is_refusal(tuned) and not is_refusal(baseline):
        yield "refusal"


def language_of(text: str) -> str | None:
    """Return `zh` or `other` by a text's script, without code; None if it has hardly any letters."""
    letters = LETTER.findall(CODE.sub("", text))
    if len(letters) < FEWEST_LETTERS:
        return None
    return "zh" if sum(map(bool, map(HAN.match, letters))) >= CHINESE_SHARE * len(letters) else "other"


def is_refusal(text: str) -> bool:
    """Return whether an answer begins as refusals do."""
    return REFUSAL.match(text.lstrip()) is not None
