"""Writes eval.html. All texts of models and files are escaped, and the page's policy lets nothing be loaded or run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from loratune.errors import counted
from loratune.evaluation.evidence import Sample
from loratune.evaluation.measures import LOSS, MEASURES, Measure, in_units, interval
from loratune.evaluation.page.plots import forgetting_plot, gains_plot
from loratune.evaluation.result import Evaluation
from loratune.evaluation.verdict import text_title
from loratune.printable import shortened, visible
from loratune.writing import write_text

PAGE = "eval.html"
STYLE = Path(__file__).with_name("style.css")
LONGEST_NAME = 24
MOST_SAMPLES = 200
OPEN_SAMPLES = 3
"""The most damaged rows, which are shown unfolded."""
TITLES = {"better": "Better", "worse": "Worse", "no difference": "No difference shown"}
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
FORMS = {
    "ended": "ended by themselves",
    "cut": "cut by the limit of tokens",
    "repetitive": "repeat themselves",
    "unwanted_thinking": "think, though not asked to",
    "missing_thinking": "do not think, though asked to",
}


def write_page(folder: Path, evaluation: Evaluation, samples: Sequence[Sample]) -> None:
    """Write an evaluation's page.

    Args:
        folder: the output folder.
        evaluation: the result.
        samples: all rows, the most damaged first.
    """
    parts = [
        _head(evaluation),
        _section("What decides", _decisions(evaluation)),
        _section("Your rows", _measures(evaluation) + _gains(evaluation, samples)),
        _section("Form of the answers", _forms(evaluation)),
        _section("What was forgotten", _general(evaluation)),
        _section("Notes", "".join(f"<p>{_text(one)}</p>" for one in evaluation.warnings)),
        _section(f"Answers, most damaged first ({_measure(evaluation)})", _samples(evaluation, samples)),
    ]
    style = STYLE.read_text(encoding="utf-8")
    write_text(
        folder / PAGE,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" '
        f'content="{POLICY}"><meta name="viewport" content="width=device-width"><title>{_title(evaluation)}</title>'
        f"<style>{style}</style></head><body>{''.join(parts)}</body></html>\n",
    )


def _text(text: str) -> str:
    """Escape a text; control characters become visible, and half of a surrogate pair a question mark."""
    return escape(visible(text)).encode("utf-8", "replace").decode()


def _section(title: str, content: str) -> str:
    return f"<h2>{_text(title)}</h2>{content}" if content else ""


def _title(one: Evaluation) -> str:
    return _text(" beside ".join(one.names))


def _head(one: Evaluation) -> str:
    return (
        f"<h1>{_title(one)}</h1>"
        f'<p class="dim">tuned: {_text(one.tuned)}; baseline: {_text(one.baseline)}; base model: {_text(one.base)}; '
        f"{_text(one.tests)}, {counted(one.rows, 'row')}</p>"
        f'<div class="verdict {one.verdict.split()[0]}"><strong>{TITLES[one.verdict]}</strong><br>'
        f"{'<br>'.join(map(_text, (one.sentence, f'decided by {_measure(one)}', *_others(one))))}</div>"
    )


def _others(one: Evaluation) -> list[str]:
    """Return what is told of measures that do not decide."""
    return [*filter(None, [one.objection]), *one.fallen.values()]


def _sides(one: Evaluation) -> tuple[str, str]:
    """Return the heads of what is of the baseline, and of what is of the tuned model, with their names."""
    tuned, baseline = (_text(shortened(name, LONGEST_NAME)) for name in one.names)
    return f"baseline: {baseline}", f"tuned: {tuned}"


def _measure(one: Evaluation) -> str:
    return MEASURES[one.decided_by].noun


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """Return a table of finished cells; each carries its column's name, which a narrow window shows beside it."""
    names = list(head)
    top = "".join(f"<th>{name}</th>" for name in names)
    lines = "".join(
        f"<tr>{''.join(f'<td{_label(name)}>{cell}</td>' for name, cell in zip(names, row, strict=True))}</tr>"
        for row in rows
    )
    return f'<table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>'


def _label(name: str) -> str:
    return f' data-label="{name}"' if name else ""


def _decisions(one: Evaluation) -> str:
    colours = {"better": "good", "worse": "bad"}
    rows = [
        (_text(each.name), f'<span class="{colours.get(each.verdict, "dim")}">{each.verdict}</span>', _text(each.why))
        for each in one.decisions
    ]
    return _table(("", "verdict", "why"), rows, "texts")


def _measures(one: Evaluation) -> str:
    rows = []
    for name, found in one.measures.items():
        measure = MEASURES[name]
        rows.append(
            (
                ", ".join(filter(None, (measure.title, measure.unit))),
                in_units(measure, found.baseline),
                in_units(measure, found.tuned),
                in_units(measure, found.difference, "+"),
                interval(measure, found),
                str(found.better),
                str(found.worse),
                str(found.equal),
            )
        )
    return _table(("", *_sides(one), "difference", "95 % interval", "better", "worse", "equal"), rows)


def _gains(one: Evaluation, samples: Sequence[Sample]) -> str:
    gains = [sample.gain for sample in samples if sample.gain is not None]
    unit = MEASURES[one.decided_by].unit
    by = f"by how {f'many {unit}' if unit else 'much'}"
    caption = f"A bar for each row: {by} {_measure(one)} became better, from the most damaged row on."
    return f'{gains_plot(gains, "gain of each row")}<p class="dim">{caption}</p>' if gains else ""


def _forms(one: Evaluation) -> str:
    rows = [
        (title, *(f"{getattr(one.form[side], name)} of {one.form[side].answers}" for side in ("baseline", "tuned")))
        for name, title in FORMS.items()
    ]
    left = one.rows - one.compared
    note = f"Without {counted(left, 'row')} that a model was trained on." if left else ""
    return _table(("", *_sides(one)), rows) + (f'<p class="dim">{note}</p>' if note else "")


def _general(one: Evaluation) -> str:
    if not one.general_text or one.general_answers is None:
        return ""
    loss = MEASURES[LOSS]
    rows = [
        (
            text_title(language, text),
            in_units(loss, text.loss.baseline),
            in_units(loss, text.loss.tuned),
            in_units(loss, text.loss.difference, "+"),
            interval(loss, text.loss),
            f"{text.kl:.3f}",
        )
        for language, text in one.general_text.items()
    ]
    head = (f"loss, {loss.unit}", *_sides(one), "difference", "95 % interval", "KL from the base")
    table = _table(head, rows)
    bound = one.inputs["settings"]["bounds"]["loss"]
    found = one.general_answers
    told = (
        f"Of {counted(found.asked, 'answer')} to general instructions, {found.language} in another language, "
        f"{found.refusal} refused, {found.empty} empty; {found.shorter} less than half as long, and {found.longer} "
        "more than twice."
    )
    changed = "".join(
        _pair(f"{each.change}: {each.instruction}", (("baseline", each.baseline), ("tuned", each.tuned)))
        for each in found.changed
    )
    caption = (
        f"The loss on general texts in {loss.unit}, the lower the better, from the baseline (grey) to the tuned model; "
        "the dashed line is the bound. The KL divergence is in the same unit: 0 if the tuned model predicts what its "
        "base does."
    )
    plot = f'{forgetting_plot(one.general_text, bound)}<p class="dim">{caption}</p>'
    return f"{table}{plot}<p>{told}</p>{changed}"


def _samples(evaluation: Evaluation, samples: Sequence[Sample]) -> str:
    measure = MEASURES[evaluation.decided_by]
    shown = "".join(
        _sample(sample, measure, place < OPEN_SAMPLES) for place, sample in enumerate(samples[:MOST_SAMPLES])
    )
    left = len(samples) - MOST_SAMPLES
    return shown + (f'<p class="dim">answers.jsonl has {counted(left, "more row")}.</p>' if left > 0 else "")


def _sample(one: Sample, measure: Measure, is_open: bool) -> str:
    gained = [] if one.gain is None else [_gained(measure, one.gain)]
    failed = [f"assert failed: {text}" for text in one.failed]
    remarks = "; ".join((*gained, *one.remarks, *failed))
    texts = [("baseline", one.baseline), ("tuned", one.tuned)]
    wide = [("question", one.question), *([("expected", one.expected)] if one.expected else [])]
    return _pair(f"{one.place}{' · ' if remarks else ''}{remarks}", texts, wide, is_open)


def _gained(measure: Measure, gain: float) -> str:
    if not gain:
        return "equal"
    return f"{'better' if gain > 0 else 'worse'} by {in_units(measure, abs(gain))} {measure.unit}".rstrip()


def _pair(
    title: str, texts: Sequence[tuple[str, str]], wide: Sequence[tuple[str, str]] = (), is_open: bool = False
) -> str:
    blocks = [
        f'<div class="{kind}"><h3>{name}</h3><pre>{_text(text)}</pre></div>'
        for kind, group in (("wide", wide), ("", texts))
        for name, text in group
    ]
    return (
        f"<details{' open' if is_open else ''}><summary>{_text(title)}</summary>"
        f'<div class="side">{"".join(blocks)}</div></details>'
    )
