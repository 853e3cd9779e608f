"""Evaluates an adapter: checks before a model is loaded, results, comparison, and the files of the output folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from loratune import console
from loratune.data.encoding.encoder import Encoder
from loratune.engine.engine import load_engine
from loratune.errors import Exit, LoratuneError, agreeing, bullet_list, counted
from loratune.evaluation.answer_form import AnswerForm, FormReader
from loratune.evaluation.evidence import Evidence, evaluation_of, samples_of
from loratune.evaluation.general import ANSWER_TOKENS, general, measure_passages, passage_kind
from loratune.evaluation.judge import add_verdicts
from loratune.evaluation.junit import JUNIT, write_junit
from loratune.evaluation.leaks import find_leaks
from loratune.evaluation.measures import measure_rows, measures_of
from loratune.evaluation.page.writing import PAGE, write_page
from loratune.evaluation.request import Contest, EvaluationRequest, Loading, encoders_of, inputs_of, plan
from loratune.evaluation.result import RESULT, RESULTS, Evaluation, Leaks, write_evaluation
from loratune.evaluation.rows_file import EvaluationRows, read_tests, unscored
from loratune.evaluation.tasks.result import TASKS_RESULT
from loratune.generation.batch.answer_file import REFUSED, AnswerFile, json_line, open_answers
from loratune.generation.batch.flow import check_tools
from loratune.generation.batch.row_answers import Side, Tally, Work, answer_rows, whole_rows
from loratune.generation.general_texts import load_instructions, load_passages
from loratune.runs.opening import open_adapter
from loratune.writing import disk_errors_explained, write_pieces

ANSWERS = "answers.jsonl"
ANNOUNCED_SECONDS = 60
"""Time of the general answers from which it is told beforehand."""
OWN = (RESULT, RESULTS, TASKS_RESULT)
"""Files by which an output folder is recognised."""


def evaluate(request: EvaluationRequest) -> Evaluation:
    """Evaluate an adapter, and write the output folder.

    Results that the folder holds are kept. So the same command goes on where it was stopped, and other asserts, bounds
    or a judge need no new answers.

    Raises:
        LoratuneError: rows, paths or models are invalid.
        Interrupted: a signal arrived; finished results are kept.
    """
    sources = [open_adapter(path, request.force) for path in (request.adapter, request.against) if path]
    record = sources[0].record
    tests = read_tests(request.tests, record.columns if record else {}, record.placeholders if record else {})
    _require_something_to_compare(request, tests)
    contest = plan(request, sources)
    encoders = encoders_of(request, contest)
    if any(row.uses_tools for row in tests.rows):
        for encoder in dict.fromkeys(encoders.values()):
            check_tools(tests.file, encoder)
    inputs = inputs_of(request, contest, tests)
    _prepare_folder(request.output)
    with open_answers(request.output / ANSWERS, inputs, request.overwrite, request.output / RESULTS) as file:
        if request.overwrite:
            _remove(request.output, ANSWERS, PAGE, JUNIT, RESULT)
        warnings = _add_missing(request, contest, tests, file)
        _require_finite(request, contest, tests, file)
        judging = add_verdicts(request.judge, tests.rows, contest.sides, file) if request.judge else None
        work = Work(tests.rows, request.sampling, contest.sides, None, True)
        forms = _forms(contest, tests, encoders, file)
        found = measure_rows(work, tests, file, forms, request.judge)
        leaks = _leaks(contest, tests, encoders, file)
        evidence = Evidence(request, contest, tests, file, found, forms, leaks, judging, tuple(warnings))
        evaluation = evaluation_of(evidence, inputs)
        samples = samples_of(evidence, evaluation)
        with disk_errors_explained(request.output):
            write_pieces(request.output / ANSWERS, map(json_line, whole_rows(work, file, found)))
            write_page(request.output, evaluation, samples)
            if request.junit:
                write_junit(request.output, evaluation, samples)
            else:
                _remove(request.output, JUNIT)
            write_evaluation(request.output, evaluation)
    return evaluation


def _require_something_to_compare(request: EvaluationRequest, tests: EvaluationRows) -> None:
    there = measures_of(tests, request.judge)
    if request.decide_by is not None and request.decide_by not in there:
        raise LoratuneError(
            f"--decide-by {request.decide_by}: no row of {tests.file.name} has it; there are {', '.join(there)}",
            Exit.USAGE,
        )
    missing = unscored(tests)
    if len(missing) == len(tests.rows) and not request.judge:
        raise LoratuneError(
            f"{tests.file.name}: no row has an expected answer or an 'assert', so nothing can be compared; add them, "
            "or give a judge with --judge",
            Exit.DATA,
        )
    if missing and not request.judge:
        lacking = agreeing(len(missing), "have neither an expected answer nor an 'assert'")
        console.warn(f"{len(missing):,} of {counted(len(tests.rows), 'row')} {lacking}")


def _prepare_folder(output: Path) -> None:
    """Make the output folder.

    Raises:
        LoratuneError: it is a file, holds something else, or cannot be made.
    """
    with disk_errors_explained(output):
        if output.exists() and not output.is_dir():
            raise LoratuneError(f"{output} is a file; choose a folder with --output", Exit.IO)
        if output.is_dir() and any(output.iterdir()) and not any((output / name).exists() for name in OWN):
            raise LoratuneError(
                f"{output} holds something that is not an evaluation; choose another folder with --output", Exit.USAGE
            )
        output.mkdir(parents=True, exist_ok=True)


def _remove(output: Path, *names: str) -> None:
    """Remove files of an earlier evaluation, which would be taken for those of this one."""
    with disk_errors_explained(output):
        for name in names:
            (output / name).unlink(missing_ok=True)


def _add_missing(request: EvaluationRequest, contest: Contest, tests: EvaluationRows, file: AnswerFile) -> list[str]:
    """Load each base that something is missing of, and add it.

    Returns:
        Warnings of loading.
    """
    warnings = []
    for loading in contest.loadings:
        if all(_is_complete(request, side, tests, file) for side in loading.sides):
            continue
        with console.status(f"loading {', '.join(str(path) for _, path in loading.adapters)}"):
            engine = load_engine(loading.adapters, loading.model, request.force)
        warnings += engine.warnings
        with closing(engine):
            tally = answer_rows(engine, Work(tests.rows, request.sampling, loading.sides, None, True), file)
            if request.general:
                work = _general_work(request, loading)
                _announce_general(work, tally, file)
                answer_rows(engine, work, file)
                for side in loading.sides:
                    if side.use_adapter:
                        measure_passages(engine, side, file)
    return warnings


def _require_finite(request: EvaluationRequest, contest: Contest, tests: EvaluationRows, file: AnswerFile) -> None:
    """Refuse models whose losses are not finite: such rows would be left out, and NaN exceeds no bound.

    Raises:
        LoratuneError: names the models.
    """
    problems = []
    for name, side in contest.named.items():
        rows = [file.read(row.number, side.loss) for row in tests.rows]
        losses = [one["loss"] for one in rows if one.get("tokens")]  # none where a row does not fit into the context
        if request.general:
            kind = passage_kind(side if side.use_adapter else contest.tuned)
            passages = [file.read(one.number, kind) for one in load_passages()]
            losses += [one["loss" if side.use_adapter else "base_loss"] for one in passages if one["tokens"]]
        broken = sum(loss is None or not math.isfinite(loss) for loss in losses)
        if broken:
            problems.append(
                f"{name}: the losses of {broken:,} of {counted(len(losses), 'text')} are not finite numbers"
            )
    if problems:
        raise LoratuneError(
            f"nothing can be compared with a model whose numbers overflow:\n{bullet_list(problems)}\n"
            "ask it with loratune infer; if it answers well, start over with --overwrite on another device",
            Exit.MODEL,
        )


def _general_work(request: EvaluationRequest, loading: Loading) -> Work:
    limit = min(ANSWER_TOKENS, request.sampling.max_new_tokens)
    rows = [one.row for one in load_instructions()]
    return Work(rows, request.sampling.but(max_new_tokens=limit), tuple(map(general, loading.sides)), None, False)


def _announce_general(work: Work, tally: Tally, file: AnswerFile) -> None:
    """Tell how long the general answers take at most at the speed of the rows' answers, if it is worth telling."""
    missing = sum(not file.has(row.number, side.answer) for row in work.rows for side in work.sides)
    limit = work.sampling.max_new_tokens
    seconds = missing * limit * tally.seconds / tally.tokens if tally.tokens else 0.0
    if seconds > ANNOUNCED_SECONDS:
        console.say(
            f"general instructions: {counted(missing, 'answer')} of at most {limit} tokens, so at most "
            f"{console.duration(seconds)} at {tally.tokens / tally.seconds:,.0f} tokens/s; --no-general leaves them out"
        )


def _is_complete(request: EvaluationRequest, side: Side, tests: EvaluationRows, file: AnswerFile) -> bool:
    """Return whether nothing has to be generated or measured for a side."""
    answered = all(
        file.has(row.number, side.answer) and (row.answer is None or file.has(row.number, side.loss))
        for row in tests.rows
    )
    if not answered or not request.general:
        return answered
    instructions = all(file.has(one.row.number, general(side).answer) for one in load_instructions())
    passages = all(file.has(one.number, passage_kind(side)) for one in load_passages())
    return instructions and (passages or not side.use_adapter)


def _forms(
    contest: Contest, tests: EvaluationRows, encoders: Mapping[str, Encoder], file: AnswerFile
) -> dict[tuple[str, int], AnswerForm]:
    """Return the form of each answer, by side and row."""
    readers = {side: FormReader(encoder) for side, encoder in encoders.items()}
    return {
        (side.name, row.number): readers[side.name].form_of(file.read(row.number, side.answer), row.reference)
        for side in contest.sides
        for row in tests.rows
    }


def _leaks(
    contest: Contest, tests: EvaluationRows, encoders: Mapping[str, Encoder], file: AnswerFile
) -> dict[str, Leaks]:
    """Look for the test rows that could be asked among the training rows of each adapter."""
    leaks = {}
    for (name, side), source in zip(contest.named.items(), contest.sources, strict=False):
        rows = [row for row in tests.rows if file.read(row.number, side.answer)["finish"] != REFUSED]
        leaks[name] = find_leaks(source, rows, encoders[side.name])
    return leaks
