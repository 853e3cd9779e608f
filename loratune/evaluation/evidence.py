"""Assembles what was found into the result of an evaluation, and into samples for its page."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from loratune.data.formats.conversation import with_reasoning, written_out
from loratune.errors import Exit, LoratuneError, agreeing, counted
from loratune.evaluation.answer_form import AnswerForm, summed
from loratune.evaluation.general import compare_answers, compare_passages
from loratune.evaluation.measures import RowMeasures, compare_rows, gain
from loratune.evaluation.request import Contest, EvaluationRequest, settings_of
from loratune.evaluation.result import Decision, Evaluation, Judging, Leaks
from loratune.evaluation.rows_file import EvaluationRows, question_of
from loratune.evaluation.statistics import Comparison
from loratune.evaluation.verdict import (
    decide,
    deciding_measure,
    fallen_measures,
    objection_to,
    overall,
    sentence_of,
    sentence_of_fall,
)
from loratune.generation.batch.answer_file import REFUSED, TOO_LONG, AnswerFile
from loratune.generation.batch.answer_header import About
from loratune.generation.batch.questions import AskedRow
from loratune.generation.batch.row_answers import Side

SHOWN = 8
"""Rows in a sentence."""


@dataclass(frozen=True)
class Evidence:
    """Everything that an evaluation has found."""

    request: EvaluationRequest
    contest: Contest
    tests: EvaluationRows
    file: AnswerFile
    """The results."""
    found: RowMeasures
    forms: Mapping[tuple[str, int], AnswerForm]
    """(side, row) → form of the answer."""
    leaks: Mapping[str, Leaks]
    judging: Judging | None
    warnings: tuple[str, ...]

    @property
    def leaked(self) -> frozenset[int]:
        """Numbers of the test rows that either model was trained on."""
        return frozenset().union(*(one.rows for one in self.leaks.values()))

    @property
    def compared(self) -> list[int]:
        """Numbers of the rows that the verdict is about."""
        rows = [row.number for row in self.tests.rows]
        return [row for row in rows if row not in self.leaked] or rows


@dataclass(frozen=True)
class Sample:
    """One row with both answers, for people."""

    row: int
    place: str
    """Its file and line or row."""
    question: str
    expected: str
    tuned: str
    baseline: str
    gain: float | None
    """By how much the tuned model is better in the deciding measure; None if the row lacks it or is left out."""
    failed: tuple[str, ...]
    """Asserts that do not hold for the tuned model."""
    failed_before: tuple[str, ...]
    """Those that do not hold for the baseline."""
    has_asserts: bool
    remarks: tuple[str, ...]
    """What is wrong with the form of the tuned model's answer, and which models were trained on the row."""


def evaluation_of(evidence: Evidence, inputs: About) -> Evaluation:
    """Compare the two models.

    Args:
        evidence: what was found.
        inputs: everything that the results depend on.

    Raises:
        LoratuneError: the measure that is to decide does not exist for these rows.
    """
    request, contest, tests = evidence.request, evidence.contest, evidence.tests
    measures = compare_rows(evidence.found, contest.sides, evidence.compared)
    name = deciding_measure(measures, request.decide_by)
    if name is None:
        raise LoratuneError(_nothing_decides(request, evidence.judging), Exit.DATA)
    texts = compare_passages(evidence.file, *contest.sides) if request.general else {}
    answers = compare_answers(evidence.file, *contest.sides) if request.general else None
    decisions = decide(name, measures, texts, answers, request.bounds)
    return Evaluation(
        tuned=str(request.adapter),
        baseline=str(request.against) if request.against else "base",
        base=_base_of(contest),
        tests=tests.file.name,
        rows=len(tests.rows),
        compared=len(evidence.compared),
        decided_by=name,
        verdict=overall(decisions),
        sentence=sentence_of(measures[name], decisions),
        objection=objection_to(name, measures),
        decisions=decisions,
        measures=measures,
        fallen=_fallen(evidence, name, measures, decisions),
        form={
            called: summed(evidence.forms[side.name, row] for row in evidence.compared)
            for called, side in contest.named.items()
        },
        general_text=texts,
        general_answers=answers,
        leaks=evidence.leaks,
        judge=evidence.judging,
        inputs={**inputs, "settings": settings_of(request, tests)},
        warnings=(
            *evidence.warnings,
            *_about_unasked(evidence),
            *_about_leaks(evidence),
            *_about_judge(evidence.judging),
        ),
    )


def _fallen(
    evidence: Evidence, decided_by: str, measures: Mapping[str, Comparison], decisions: Collection[Decision]
) -> dict[str, str]:
    """Return a sentence about each measure that is worse without any decision that says so, with the rows to read."""
    told = {}
    for name in fallen_measures(decided_by, measures, decisions):
        gains = {row: gain(evidence.found, evidence.contest.sides, row, name) for row in evidence.compared}
        rows = [row for row, gained in gains.items() if gained is not None and gained < -measures[name].margin]
        places = evidence.tests.file.places(rows, SHOWN)
        told[name] = f"{sentence_of_fall(name, measures[name])}; read the answers to {places}"
    return told


def samples_of(evidence: Evidence, evaluation: Evaluation) -> list[Sample]:
    """Return all rows with both answers, the most damaged first; rows that decide nothing come last."""
    compared = {*evidence.compared}
    samples = [
        _sample(evidence, row, evaluation.decided_by if row.number in compared else None) for row in evidence.tests.rows
    ]
    return sorted(samples, key=lambda one: (one.gain is None, one.gain or 0.0, one.row))


def _sample(evidence: Evidence, row: AskedRow, measure: str | None) -> Sample:
    """Return a row's sample; measure is the deciding one, None for a row that is left out."""
    number, (tuned, baseline) = row.number, evidence.contest.sides
    form = evidence.forms[tuned.name, number]
    remarks = {
        "was in the training": number in evidence.leaks["tuned"].rows,
        "was in the baseline's training": number in evidence.leaks.get("baseline", Leaks(False)).rows,
        "did not end by itself": not form.ended,
        "repeats itself": form.repetitive,
        "thinks, though not asked to": form.unwanted_thinking,
        "does not think, though asked to": form.missing_thinking,
    }
    return Sample(
        row=number,
        place=row.place,
        question=question_of(row),
        expected=row.reference or "",
        tuned=_said(evidence.file, number, tuned),
        baseline=_said(evidence.file, number, baseline),
        gain=gain(evidence.found, evidence.contest.sides, number, measure) if measure else None,
        failed=tuple(evidence.found[tuned.name, number].get("failed_asserts", ())),
        failed_before=tuple(evidence.found[baseline.name, number].get("failed_asserts", ())),
        has_asserts=number in evidence.tests.asserts,
        remarks=tuple(text for text, holds in remarks.items() if holds),
    )


def _said(file: AnswerFile, row: int, side: Side) -> str:
    known: dict[str, Any] = file.read(row, side.answer)
    answer = written_out(known["answer"], known.get("tool_calls", ()))
    return with_reasoning(answer, known.get("reasoning", "")) or str(known.get("error", ""))


def _base_of(contest: Contest) -> str:
    source = contest.sources[0]
    return source.trained_base.name if source.manifest else str(source.adapter)


def _nothing_decides(request: EvaluationRequest, judging: Judging | None) -> str:
    if judging and judging.problem:
        return f"the judge could not be asked about any row ({judging.problem}); the answers are kept"
    wanted = request.decide_by or "a measure"
    return f"no row that is compared has {wanted}; shorten rows that do not fit into the context, or add others"


def _about_unasked(evidence: Evidence) -> list[str]:
    """Tell which rows a model could not be asked, and count as answered wrongly."""
    told = []
    for name, side in evidence.contest.named.items():
        answers = {row.number: evidence.file.read(row.number, side.answer) for row in evidence.tests.rows}
        missing = [number for number, answer in answers.items() if answer["finish"] in (TOO_LONG, REFUSED)]
        if missing:
            why = answers[missing[0]].get("error", "its prompt leaves no room in the context")
            places = evidence.tests.file.places(missing, SHOWN)
            told.append(f"{counted(len(missing), 'row')} without an answer ({name}): {places}: {why}")
    return told


def _about_leaks(evidence: Evidence) -> list[str]:
    told = []
    for name, one in evidence.leaks.items():
        whose = "the training rows" if name == "tuned" else f"the training rows of {evidence.request.against}"
        if one.rows:
            told.append(
                f"{counted(len(one.rows), 'test row')} found in {whose} ({len(one.same)} the same, "
                f"{len(one.same_question)} with the same question, {len(one.near)} nearly the same): "
                f"{evidence.tests.file.places(sorted(one.rows), SHOWN)}"
            )
        if one.reason:
            told.append(f"test rows in {whose}: {'' if one.checked else 'not looked for, because '}{one.reason}")
    left = len(evidence.tests.rows) - len(evidence.compared)
    if left:
        told.append(f"{counted(left, 'row')} that a model was trained on {agreeing(left, 'are left out')}")
    elif evidence.leaked:
        told.append("a model was trained on every test row, so the figures show what it remembers")
    return told


def _about_judge(judging: Judging | None) -> list[str]:
    if judging is None or not judging.not_judged:
        return []
    return [
        f"{counted(judging.not_judged, 'row')} not judged: {judging.problem}; the same command asks about them again"
    ]
