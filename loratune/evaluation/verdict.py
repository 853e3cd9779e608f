"""Decides whether the tuned model is better or worse, and says what decided."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from loratune.errors import counted
from loratune.evaluation.bounds import Bounds
from loratune.evaluation.measures import DECIDING, EXACT, FORM, LOSS, MEASURES, Measure, in_units, interval
from loratune.evaluation.result import Decision, GeneralAnswers, GeneralText
from loratune.evaluation.statistics import CONFIDENCE, FEWEST_DIFFERING, Comparison, Verdict

LANGUAGES = {"en": "English", "zh": "Chinese"}
FORM_BOUND = 0.1
"""Share of the answers that may lose their form."""
LEAST_FALL = 0.01
"""Share of the answers from which a fall of a measure that does not decide is told, even if chance may explain it."""
ROWS, FORM_OF_ANSWERS = "rows", "form of the answers"
"""Names of decisions."""


def deciding_measure(measures: Collection[str], asked: str | None) -> str | None:
    """Return the measure that decides about the rows; None if there is none.

    Args:
        measures: names of the measures that some rows have.
        asked: name of the measure that the user asks for.
    """
    if asked is not None:
        return asked if asked in measures else None
    return next((name for name in DECIDING if name in measures), None)


def decide(
    name: str,
    measures: Mapping[str, Comparison],
    texts: Mapping[str, GeneralText],
    answers: GeneralAnswers | None,
    bounds: Bounds,
) -> tuple[Decision, ...]:
    """Return a decision about the rows, the form of their answers, and what was forgotten.

    Args:
        name: the measure that decides about the rows.
        measures: name → comparison.
        texts: language → comparison of general text.
        answers: comparison of the answers to general instructions.
        bounds: of forgetting.
    """
    decisions = [Decision(ROWS, measures[name].verdict, _about_rows(name, measures[name]))]
    decisions.append(_of_form(measures[FORM]))
    decisions += (_of_text(language, text, bounds.loss) for language, text in texts.items())
    if answers:
        decisions.append(_of_answers(answers, bounds.changed))
    return tuple(decisions)


def overall(decisions: Collection[Decision]) -> Verdict:
    """Return `worse` if anything is, and else the verdict on the rows."""
    if any(one.verdict == "worse" for one in decisions):
        return "worse"
    return next(one.verdict for one in decisions if one.name == ROWS)


def worse_beside_rows(decisions: Collection[Decision]) -> list[str]:
    """Return the names of the decisions that make an adapter worse which is not worse on the rows."""
    worse = [one.name for one in decisions if one.verdict == "worse"]
    return [] if ROWS in worse else worse


def sentence_of(comparison: Comparison, decisions: Collection[Decision]) -> str:
    """Return the result in one sentence: what makes it worse beside the rows, the rows, and what they cannot show."""
    rows = counted(comparison.rows, "row")
    on_rows = f"better on {comparison.better} of {rows}, worse on {comparison.worse}{_doubt(comparison)}"
    beside = worse_beside_rows(decisions)
    return f"{' and '.join(beside)}; the rows themselves: {on_rows}" if beside else on_rows


def _doubt(one: Comparison) -> str:
    """Return why rows show no difference, or which they could not show."""
    if one.rows < FEWEST_DIFFERING:
        return f"; at least {FEWEST_DIFFERING} rows are needed to show a difference"
    is_none = one.verdict == "no difference"
    if not is_none or one.better + one.worse < FEWEST_DIFFERING:
        rest = "; more rows can show a smaller one" if is_none else ""
        rows = counted(one.rows, "row")
        return f"; with {rows}, only a difference on at least {FEWEST_DIFFERING} of them can show{rest}"
    if one.p_value >= 1 - CONFIDENCE:
        return f", which chance may explain (sign test, p = {one.p_value:.2g}); more rows can show a smaller difference"
    if abs(one.difference) <= one.margin:
        return f"; the mean differs by no more than {one.margin:g}, which counts as none"
    if one.low <= 0 <= one.high:
        return "; the 95 % interval of the mean difference includes 0; more rows make it narrower"
    return "; a few large differences outweigh the others"


def objection_to(decided_by: str, measures: Mapping[str, Comparison]) -> str:
    """Return what other measures say for the tuned model, or lack, where the deciding one says otherwise.

    Measures that are worse are told one by one: see `fallen_measures`.

    Args:
        decided_by: the measure that decides about the rows.
        measures: name → comparison.

    Returns:
        A sentence with the way to let another measure decide; empty if none says otherwise.
    """
    verdict, exact = measures[decided_by].verdict, measures.get(EXACT)
    better = [name for name, one in measures.items() if one.verdict == "better" != verdict]
    if better:
        nouns = " and ".join(MEASURES[name].noun for name in better)
        return (
            f"the adapter is better by {nouns}, more than chance explains, but {MEASURES[decided_by].noun} decided; "
            f"for a verdict by another measure: eval --decide-by {better[0]}"
        )
    if verdict == "better" and decided_by == LOSS and exact and not exact.tuned:
        return (
            "no answer is word for word the expected one, and the loss only says how likely those have become; "
            f"eval --decide-by {EXACT} or rouge_l compares the answers themselves"
        )
    return ""


def fallen_measures(decided_by: str, measures: Mapping[str, Comparison], decisions: Collection[Decision]) -> list[str]:
    """Return the names of the measures that are worse without any decision that says so.

    Args:
        decided_by: the measure that decides about the rows, whose sentence is there anyway.
        measures: name → comparison.
        decisions: on these comparisons. One that is worse already tells of its measures: of the form of the answers, or
            of all others.
    """
    worse = {one.name for one in decisions if one.verdict == "worse"}
    told = {name: FORM_OF_ANSWERS if name == FORM else ROWS for name in measures}
    return [
        name
        for name, one in measures.items()
        if name != decided_by and told[name] not in worse and _has_fallen(MEASURES[name], one)
    ]


def _has_fallen(measure: Measure, one: Comparison) -> bool:
    """Return whether a measure is worse: by its test, or, if answers can be counted by it, by enough of them."""
    is_counted = measure.is_share and one.worse > one.better and -one.difference >= LEAST_FALL
    return one.verdict == "worse" or is_counted


def sentence_of_fall(name: str, one: Comparison) -> str:
    """Return by how much a measure is worse, on how many rows, and whether chance may explain it."""
    measure = MEASURES[name]
    way = f"{'rose' if measure.is_loss else 'fell'} from {in_units(measure, one.baseline)}"
    chance = "more than chance explains" if one.verdict == "worse" else "which chance may explain"
    return (
        f"{measure.noun} {way} to {in_units(measure, one.tuned)}: worse on {one.worse} of {counted(one.rows, 'row')}, "
        f"better on {one.better}, {chance}"
    )


def text_title(language: str, text: GeneralText) -> str:
    """Return what a table calls the general texts of a language."""
    return f"{LANGUAGES.get(language, language)}, {counted(text.passages, 'passage')}"


def _about_rows(name: str, one: Comparison) -> str:
    measure = MEASURES[name]
    return (
        f"{measure.noun}: {in_units(measure, one.baseline)} → {in_units(measure, one.tuned)}, {CONFIDENCE:.0%} "
        f"interval of the difference {interval(measure, one)}, sign test p = {one.p_value:.2g}"
    )


def _of_form(one: Comparison) -> Decision:
    """Decide about the answers that end by themselves, do not repeat themselves, and think as they are asked to."""
    verdict: Verdict = "worse" if one.verdict == "worse" and -one.difference > FORM_BOUND else "no difference"
    why = f"sound answers: {one.baseline:.0%} → {one.tuned:.0%}; worse is a significant loss of over {FORM_BOUND:.0%}"
    return Decision(FORM_OF_ANSWERS, verdict, why)


def _of_text(language: str, text: GeneralText, bound: float) -> Decision:
    grown = text.loss.difference
    why = f"loss {text.loss.baseline:.3f} → {text.loss.tuned:.3f}, {grown:+.3f} nats per token; the bound is {bound:+g}"
    name = f"general text, {LANGUAGES.get(language, language)}"
    return Decision(name, "worse" if grown > bound else "no difference", why)


def _of_answers(answers: GeneralAnswers, bound: float) -> Decision:
    changed = len({one.instruction for one in answers.changed})
    why = (
        f"of {counted(answers.asked, 'answer')}, {answers.language} in another language, {answers.refusal} refused, "
        f"{answers.empty} empty; the bound is {bound:.0%}"
    )
    return Decision("general instructions", "worse" if changed > bound * answers.asked else "no difference", why)
