"""Answers every row of a file: checks before the model is loaded, generation, scores, and the summary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loratune import console
from loratune.data.encoding.encoder import Encoder
from loratune.errors import Exit, LoratuneError, bullet_list, counted
from loratune.generation.batch.answer_file import AnswerFile, check_output, finished_report, open_answers
from loratune.generation.batch.questions import QuestionFile, read_questions
from loratune.generation.batch.report import SHOWN_ROWS, RowsSummary, report_of, show, summary_of
from loratune.generation.batch.request import RowsRequest, encoder_of, everything_asked
from loratune.runs.opening import open_adapter

if TYPE_CHECKING:
    from loratune.engine.engine import Engine
    from loratune.generation.batch.answer_scores import RowScores
    from loratune.generation.batch.row_answers import Work


def answer_rows_of_file(request: RowsRequest) -> RowsSummary:
    """Answer all rows of a file that have no answer yet.

    Returns:
        A summary for scripts.

    Raises:
        LoratuneError: rows, paths or models are invalid.
        Interrupted: a signal arrived; finished results are kept.
    """
    if request.metrics:
        import loratune.generation.batch.text_metrics  # noqa: F401 - missing packages are told before anything is read
    source = open_adapter(request.adapter[1], request.force) if request.adapter else None
    known = source.record if source else None
    file = read_questions(request.input, known.columns if known else {}, known.placeholders if known else {})
    if request.metrics and all(row.reference is None for row in file.rows):
        raise LoratuneError(f"{file.name}: --metrics compares with the rows' own answers, and none has one", Exit.DATA)
    check_output(request.output, file.name)
    if any(row.uses_tools for row in file.rows):
        check_tools(file, encoder_of(request, source))
    about = everything_asked(request, source, file)
    report = None if request.overwrite else finished_report(request.output, about)
    if report and request.is_answered_by(report):
        console.say(f"{request.output} is complete: {counted(len(file.rows), 'row')}", style="bold")
        return summary_of(report, request, file)
    with open_answers(request.output, about, request.overwrite) as answers:
        if report and not answers.count("answer"):
            answers.take_finished()
        return _make_missing(request, file, answers)


def _make_missing(request: RowsRequest, file: QuestionFile, answers: AnswerFile) -> RowsSummary:
    """Load the model, generate and score the missing results, and write the final file."""
    with console.status(f"loading {request.adapter[1] if request.adapter else request.model}"):
        from loratune.generation.batch.row_answers import answer_rows, free_names, whole_rows

        engine = _load(request)
    work = _work(request, file)
    for name, other in free_names(work).items():
        console.warn(f"the rows' column {name} is written as {other}, because the answers use its name")
    kept = sum(answers.count(side.answer) for side in work.sides)
    if kept:
        console.say(f"{counted(kept, 'answer')} of an earlier run kept")
    try:
        tally = answer_rows(engine, work, answers)
    finally:
        engine.close()
    scores, sums = _scores(work, answers)
    report = report_of(work, answers, sums) | {"compares": request.compares}
    answers.finish(whole_rows(work, answers, scores), report)
    show(request, work, file, tally, report)
    return {
        **summary_of(report, request, file),
        "answered": tally.answers,
        "kept": kept,
        "seconds": round(tally.seconds, 3),
        "tokens_per_second": round(tally.tokens / tally.seconds, 3) if tally.tokens else 0.0,
    }


def _load(request: RowsRequest) -> Engine:
    from loratune.engine.engine import load_engine

    engine = load_engine([request.adapter] if request.adapter else [], request.model, request.force)
    for warning in engine.warnings:
        console.warn(warning)
    return engine


def _work(request: RowsRequest, file: QuestionFile) -> Work:
    from loratune.generation.batch.row_answers import BASE, Side, Work

    adapter = request.adapter[0] if request.adapter else None
    first = Side("", adapter, not request.no_adapter or request.compares)
    sides = (first, Side(BASE, adapter, False)) if request.compares else (first,)
    return Work(file.rows, request.sampling, sides, request.system, request.metrics)


def _scores(work: Work, answers: AnswerFile) -> tuple[RowScores, dict[str, dict[str, Any]]]:
    """Return the metrics per row and per side; empty if they were not requested."""
    if not work.scores:
        return {}, {}
    from loratune.generation.batch.answer_scores import score_rows

    return score_rows(work, answers)


def check_tools(file: QuestionFile, encoder: Encoder) -> None:
    """Raise if rows use tools that the template does not support; warn if it cannot parse calls."""
    bad = []
    for row in file.rows:
        messages = [*row.messages, *([row.answer] if row.answer else [])]
        try:
            encoder.check_tools(messages, row.tools)
        except LoratuneError as error:
            bad.append(f"{row.place}: {error}")
    if bad:
        listed = bullet_list(bad, limit=SHOWN_ROWS)
        raise LoratuneError(f"{file.name}: {counted(len(bad), 'row')} cannot be asked:\n{listed}", Exit.DATA)
    if encoder.about_calls and any(row.tools for row in file.rows):
        console.warn(encoder.about_calls)
