"""Shows an evaluation in the terminal: a table, the sentence, and where the rest is."""

from __future__ import annotations

from pathlib import Path

from loratune import console
from loratune.commands import Command, loratune
from loratune.errors import counted
from loratune.evaluation.measures import LOSS, MEASURES, Measure, in_units, interval
from loratune.evaluation.page.writing import PAGE, TITLES
from loratune.evaluation.result import Evaluation
from loratune.evaluation.statistics import Comparison
from loratune.evaluation.verdict import FORM_OF_ANSWERS, text_title, worse_beside_rows
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
    _show_figures(evaluation)
    console.say(f"{TITLES[evaluation.verdict]}: {evaluation.sentence}", style="bold")
    beside = worse_beside_rows(evaluation.decisions)
    is_asked = evaluation.inputs["settings"]["decide_by"] is not None
    hint = "" if is_asked or evaluation.objection else "; --decide-by takes another measure"
    console.say(f"{'rows are ' if beside else ''}decided by {MEASURES[evaluation.decided_by].noun}{hint}")
    if evaluation.objection:
        console.say(evaluation.objection)
    for one in evaluation.decisions:
        if one.verdict == "worse":
            console.say(f"worse: {one.name}: {one.why}")
    if set(beside) - {FORM_OF_ANSWERS}:
        console.say("what helps: a lower training.learning_rate, or general rows mixed into data.train")
    for sentence in evaluation.fallen.values():
        console.warn(sentence)
    console.say(f"answers side by side: {output / PAGE}")
    console.next_step(_next(evaluation))


def _show_figures(one: Evaluation) -> None:
    """Print who is compared, a table of the rows, and one of the general texts."""
    baseline = f"its base, {one.base}" if one.baseline == "base" else one.baseline
    console.table([("tuned", one.tuned), ("baseline", baseline)])
    loss, head = MEASURES[LOSS], ("baseline", "tuned", "95 % interval", "better", "worse")
    rows = [_line(MEASURES[name].title, MEASURES[name], found) for name, found in one.measures.items()]
    units = f"; the loss is in {loss.unit}, the lower the better" if LOSS in one.measures else ""
    console.comparison([("", *head), *rows], title=f"{counted(one.compared, 'row')}{units}")
    texts = [_line(text_title(language, text), loss, text.loss) for language, text in one.general_text.items()]
    if texts:
        console.comparison([("", *head), *texts], title=f"general texts: the loss in {loss.unit}, the lower the better")


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
