"""Shows an evaluation in the terminal: a table, the sentence, and where the rest is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from loratune import console
from loratune.commands import Command, loratune
from loratune.evaluation.measures import LOSS, MEASURES, Measure, in_units, interval
from loratune.evaluation.page.writing import PAGE, TITLES
from loratune.evaluation.result import Evaluation
from loratune.evaluation.statistics import Comparison
from loratune.evaluation.verdict import FORM_OF_ANSWERS, LANGUAGES, worse_beside_rows
from loratune.runs.lineage import merged_beside
from loratune.runs.state import merging_command


def show_evaluation(evaluation: Evaluation, output: Path) -> None:
    """Print a result.

    Args:
        evaluation: the result.
        output: its folder.
    """
    for warning in evaluation.warnings:
        console.warn(warning)
    console.comparison([("", "baseline", "tuned", "95 % interval", "better", "worse"), *_lines(evaluation)])
    console.say(f"{TITLES[evaluation.verdict]}: {evaluation.sentence}", style="bold")
    beside = worse_beside_rows(evaluation.decisions)
    console.say(f"{'rows are ' if beside else ''}decided by {MEASURES[evaluation.decided_by].noun}")
    for one in evaluation.decisions:
        if one.verdict == "worse":
            console.say(f"worse: {one.name}: {one.why}")
    if set(beside) - {FORM_OF_ANSWERS}:
        console.say("what helps: a lower training.learning_rate, or general rows mixed into data.train")
    for sentence in evaluation.fallen.values():
        console.warn(sentence)
    console.say(f"answers side by side: {output / PAGE}")
    console.next_step(_next(evaluation))


def _lines(one: Evaluation) -> Iterator[tuple[str, ...]]:
    for name, found in one.measures.items():
        yield _line(MEASURES[name].title, MEASURES[name], found)
    for language, text in one.general_text.items():
        yield _line(f"loss, {LANGUAGES.get(language, language)} text", MEASURES[LOSS], text.loss)


def _line(title: str, measure: Measure, found: Comparison) -> tuple[str, ...]:
    values = (in_units(measure, value) for value in (found.baseline, found.tuned))
    return title, *values, interval(measure, found), str(found.better), str(found.worse)


def _next(one: Evaluation) -> Command:
    """Return the command to go on with: merge what is not worse, or ask the merged model, and ask what is worse."""
    if one.is_worse:
        return loratune("ask it yourself", "infer", {"--adapter": one.tuned})
    if merged := merged_beside(Path(one.tuned)):
        return loratune("it is merged; try it", "infer", {"--model": merged})
    return merging_command(Path(one.tuned))
