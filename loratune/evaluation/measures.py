"""The measures of a row: what each is called, which way is better, and what counts as no difference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratune.evaluation.answer_form import AnswerForm
from loratune.evaluation.asserts import Said
from loratune.evaluation.judge import Judge, preference
from loratune.evaluation.rows_file import EvaluationRows
from loratune.evaluation.statistics import Comparison, compare
from loratune.generation.batch.answer_file import AnswerFile
from loratune.generation.batch.answer_scores import score_rows
from loratune.generation.batch.row_answers import Side, Work

LOSS, ASSERTS, JUDGE, FORM, EXACT = "loss", "asserts", "judge", "form", "exact_match"


@dataclass(frozen=True)
class Measure:
    title: str
    """For tables."""
    noun: str
    """For sentences."""
    margin: float = 0.0
    """Differences up to it count as none."""
    is_loss: bool = False
    digits: int = 3
    is_share: bool = False
    unit: str = ""
    """Of a value as `in_units` writes it; empty for numbers without one, and for shares."""


MEASURES = {
    ASSERTS: Measure("asserts that hold", "the asserts that hold", is_share=True),
    JUDGE: Measure("judge prefers it", "the judge's preference", is_share=True),
    LOSS: Measure(
        "loss of answers", "the loss of the expected answers", margin=0.02, is_loss=True, unit="nats per token"
    ),
    EXACT: Measure("exact match", "exact answers", is_share=True),
    "rouge_l": Measure("ROUGE-L", "ROUGE-L", margin=0.02),
    "bleu": Measure("BLEU", "BLEU", margin=2.0, digits=1),
    FORM: Measure("sound form", "sound answers", is_share=True),
}
"""Name of a measure → what it is, in the order of tables."""
DECIDING = (ASSERTS, JUDGE, LOSS)
"""Measures that decide about the rows; the first that some row has does, unless another is asked for."""

OF_REFERENCES = (LOSS, EXACT, "rouge_l", "bleu")
"""Measures of rows with an expected answer."""

RowMeasures = dict[tuple[str, int], dict[str, Any]]
"""(side, row) → measures, and what else is written of an answer."""


def measures_of(tests: EvaluationRows, judge: Judge | None) -> list[str]:
    """Return the names of the measures that some row has."""
    there = {FORM, *(OF_REFERENCES if any(row.reference is not None for row in tests.rows) else ())}
    there |= ({ASSERTS} if tests.asserts else set()) | ({JUDGE} if judge else set())
    return [name for name in MEASURES if name in there]


def measure_rows(
    work: Work,
    tests: EvaluationRows,
    file: AnswerFile,
    forms: Mapping[tuple[str, int], AnswerForm],
    judge: Judge | None,
) -> RowMeasures:
    """Compute the measures of all rows.

    Args:
        work: the rows, the tuned side and the baseline.
        tests: the same rows, with their asserts.
        file: holds all results.
        forms: (side, row) → form of the answer.
        judge: whose verdicts the file holds, if any.
    """
    known = score_rows(work, file)[0] if any(row.reference is not None for row in work.rows) else {}
    tuned, baseline = work.sides
    found: RowMeasures = {key: _without_perplexity(values) for key, values in known.items()}
    for side in work.sides:
        for row in work.rows:
            values = found.setdefault((side.name, row.number), {})
            values |= _loss(file, row.number, side, baseline)
            values |= _asserts(file, row.number, side, tests)
            values[FORM] = float(forms[side.name, row.number].is_sound)
            if judge and file.has(row.number, judge.kind):
                liked = preference(*file.read(row.number, judge.kind)["choices"])
                values[JUDGE] = liked if side is tuned else 1 - liked
    return found


def compare_rows(found: RowMeasures, sides: Sequence[Side], rows: Iterable[int]) -> dict[str, Comparison]:
    """Compare the two sides by each measure, on the rows that both have it of.

    Args:
        found: the measures of all rows.
        sides: the tuned model and the baseline.
        rows: numbers of the rows to compare.
    """
    tuned, baseline = (side.name for side in sides)
    chosen, comparisons = list(rows), {}
    for name, measure in MEASURES.items():
        both = [row for row in chosen if name in found[tuned, row] and name in found[baseline, row]]
        if both:
            own, other = ([float(found[side, row][name]) for row in both] for side in (tuned, baseline))
            comparisons[name] = compare(other, own, measure.margin, measure.is_loss)
    return comparisons


def gain(found: RowMeasures, sides: Sequence[Side], row: int, name: str) -> float | None:
    """Return by how much the tuned model is better on a row; None if the row lacks the measure."""
    own, other = (found[side.name, row].get(name) for side in sides)
    if own is None or other is None:
        return None
    difference = float(own) - float(other)
    return -difference if MEASURES[name].is_loss else difference


def _without_perplexity(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "perplexity"}


def _loss(file: AnswerFile, row: int, side: Side, baseline: Side) -> dict[str, Any]:
    """Return the loss in nats per token, as the baseline's tokenizer counts them."""
    own, other = file.read(row, side.loss), file.read(row, baseline.loss)
    if own.get("loss") is None or other.get("loss") is None or not math.isfinite(own["loss"]):
        return {}
    return {LOSS: own["loss"] / other["tokens"]}


def _asserts(file: AnswerFile, row: int, side: Side, tests: EvaluationRows) -> dict[str, Any]:
    """Return the share of a row's asserts that hold, and those that do not."""
    asserts = tests.asserts.get(row)
    if not asserts:
        return {}
    known = file.read(row, side.answer)
    calls = tuple(call["function"] for call in known.get("tool_calls", ()))
    said = Said(known["answer"], tuple({"name": call["name"], "arguments": call["arguments"]} for call in calls))
    failed = [one.title for one in asserts if not one.holds(said)]
    return {ASSERTS: 1 - len(failed) / len(asserts), "failed_asserts": failed}


def in_units(measure: Measure, value: float, sign: str = "") -> str:
    """Return a value of a measure as text, with its sign if `sign` is +."""
    return format(value, f"{sign}.1%" if measure.is_share else f"{sign}.{measure.digits}f")


def interval(measure: Measure, found: Comparison) -> str:
    """Return the bootstrap interval of a difference as text."""
    return f"{in_units(measure, found.low, '+')} to {in_units(measure, found.high, '+')}"
