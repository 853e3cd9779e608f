"""Draws a sweep: what ranks it over the first setting, a curve for each combination of the others, a panel per rung."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from loratune.errors import counted
from loratune.sweep.report import Standing, SweepReport, TrialReport
from loratune.sweep.showing import rows_of
from loratune.sweep.space import short_names, text_of
from loratune.writing import write_pieces, write_text

PICTURE, PAGE = "sweep.png", "sweep.html"
MOST_PANELS, MOST_CURVES = 3, 8
MARKS: dict[str, Any] = {"marker": "o", "markersize": 5, "capsize": 3}
ROOM = 36
"""Letters that fit below a panel in one line."""
SPREAD = 3
"""Numbers that are this far apart are drawn on a logarithmic scale."""
CAPTION = (
    "The picture shows {drawn}. Losses are in {unit}. “forgot” is by how much the loss of bundled general texts has "
    "risen, in English or Chinese, whichever was forgotten more."
)
COLORS = ("#2b5c9e", "#d1495b", "#3a7d44", "#8e5bb5", "#c98a1b", "#3b9ba6", "#7a5c45", "#666666")
STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd } th { color: #666; font-weight: 500 }
tr.best { background: #eef4fb } img { max-width: 100%; margin: 1.5rem 0 } p.found { font-size: 17px }
.scroll { overflow-x: auto }"""


def draw(folder: Path, report: SweepReport) -> None:
    """Write the picture, and the page that holds it and the table."""
    picture = picture_of(report)
    write_pieces(folder / PICTURE, [picture])
    write_text(folder / PAGE, page_of(report, picture))


def picture_of(report: SweepReport) -> bytes:
    """Return the curves as PNG."""
    content = io.BytesIO()
    figure_of(report).savefig(content, format="png")
    return content.getvalue()


def figure_of(report: SweepReport) -> Figure:
    """Return the curves."""
    panels = _panels(report)
    figure = Figure(figsize=(max(7, 4.6 * len(panels)), 4.6), layout="constrained", dpi=120)
    for place, (title, trials) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        _draw_panel(axes, report, trials, is_last=place == len(panels))
        axes.set_title(title, fontsize=10)
    return figure


def _panels(report: SweepReport) -> list[tuple[str, list[tuple[TrialReport, float]]]]:
    """Return title, and trials with what ranks them there, for the last rungs; each is a step that trials share."""
    mains = [trial for trial in report.trials if trial.repeats is None]
    panels = []
    for rung in range(len(report.shares)):
        at = {trial.name: list(trial.losses)[rung] for trial in mains if len(trial.losses) > rung}
        figures = [(trial, _figures(report, trial).get(at[trial.name])) for trial in mains if trial.name in at]
        there = [(trial, figure) for trial, figure in figures if figure is not None]
        if there:
            steps = sorted({int(at[trial.name]) for trial, _ in there})
            ends = str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
            panels.append((f"{counted(len(there), 'trial')} at step {ends}", there))
    return panels[-MOST_PANELS:]


def _figures(report: SweepReport, trial: TrialReport) -> Mapping[str, float]:
    """Return step of each rung → what the trials are ranked by."""
    return trial.exacts if report.ranked_by == "exact" else trial.losses


def _repeated(report: SweepReport, standing: Standing) -> tuple[float, float]:
    """Return the mean of what the trials are ranked by, and its deviation over the seeds."""
    if report.ranked_by == "exact":
        return standing.exact or 0.0, standing.exact_deviation or 0.0
    return standing.loss, standing.deviation or 0.0


def _draw_panel(axes: Any, report: SweepReport, trials: Sequence[tuple[TrialReport, float]], is_last: bool) -> None:
    setting, *others = report.over
    values, spread = report.over[setting], {one.name: one for one in report.repeated}
    curves = dict[str, list[tuple[float, float, float]]]()
    for trial, figure in trials:
        if setting not in trial.settings:  # its method makes no use of it
            continue
        standing = spread.get(trial.name) if is_last else None
        point = _repeated(report, standing) if standing else (figure, 0.0)
        place = _place(values, trial.settings[setting])
        curves.setdefault(_curve(trial, others), []).append((place, *point))
    names, line = _curves(report, others), "-" if _are_numbers(values) else ":"
    for name in sorted(curves, key=names.index)[:MOST_CURVES]:
        where, figures, errors = zip(*sorted(curves[name]), strict=True)
        color = COLORS[names.index(name) % len(COLORS)]
        axes.errorbar(where, figures, errors, **MARKS, linestyle=line, color=color, label=name or None)
    axes.set(xlabel=setting, ylabel=_shown(report))
    if report.ranked_by == "exact":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.25)
    _set_scale(axes, values)
    if any(curves):
        axes.legend(frameon=False, fontsize=9)


def _shown(report: SweepReport) -> str:
    """Return what the picture shows."""
    return "exact validation answers" if report.ranked_by == "exact" else f"validation loss ({report.unit})"


def _set_scale(axes: Any, values: Any) -> None:
    """Give all panels the same horizontal axis: a mark for each value, or the range."""
    if not _are_numbers(values):
        words = [text_of(value) for value in values]
        is_crowded = sum(map(len, words)) > ROOM
        axes.set_xticks(range(len(words)), words, rotation=25 * is_crowded, ha="right" if is_crowded else "center")
        axes.set_xlim(-0.5, len(values) - 0.5)
        return
    ends = [float(end) for end in (values.split("..") if isinstance(values, str) else values)]
    low, high = min(ends), max(ends)
    if low > 0 and high / low >= SPREAD:
        axes.set_xscale("log")
        axes.set_xlim(low / (high / low) ** 0.06, high * (high / low) ** 0.06)
    elif high > low:
        axes.set_xlim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    if not isinstance(values, str):
        axes.set_xticks(values, map(text_of, values))
        axes.set_xticks([], minor=True)


def _curve(trial: TrialReport, others: Sequence[str]) -> str:
    names = short_names(others)
    there = [other for other in others if other in trial.settings]
    return ", ".join(f"{names[other]} {text_of(trial.settings[other])}" for other in there)


def _curves(report: SweepReport, others: Sequence[str]) -> list[str]:
    """Return the names of all curves in the order of the trials, so that one has one colour in all panels."""
    mains = sorted((trial for trial in report.trials if trial.repeats is None), key=lambda trial: trial.name)
    return list(dict.fromkeys(_curve(trial, others) for trial in mains))


def _are_numbers(values: Any) -> bool:
    """Return whether a setting's values have places on a scale: a range, which is text, or a list of numbers."""
    return isinstance(values, str) or all(isinstance(one, int | float) and not isinstance(one, bool) for one in values)


def _place(values: Any, value: Any) -> float:
    return float(value) if _are_numbers(values) else values.index(value)


def page_of(report: SweepReport, picture: bytes) -> str:
    """Return a page that needs nothing else: the sentence, the picture, the table and what has failed."""
    head, *rows = rows_of(report)
    best = report.best.name.partition("-")[0] if report.best else None
    cells = ""
    for row in rows:
        inner = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        cells += f"<tr{' class=best' if row[0] == best else ''}>{inner}</tr>\n"
    failed = "".join(
        f"<li>{html.escape(trial.name)}: {html.escape(trial.message)}</li>" for trial in report.trials if trial.message
    )
    drawn = "exact answers, by which the trials are ranked" if report.ranked_by == "exact" else "validation losses"
    what = {"loss": "Losses", "exact": "Shares of exact answers"}
    noise = (
        f"<p>{what[report.noise.of]} differ by {report.noise.deviation:.4f} from seed to seed (standard deviation, "
        f"{report.noise.degrees} degrees of freedom); two single trials by more than "
        f"{report.noise.least_difference:.4f} in 5 of 100 cases. ± is the deviation of the loss over the seeds.</p>"
        if report.noise
        else ""
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(report.output)}</title>\n'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>\n'
        f"<h1>{html.escape(report.output)}</h1>\n<p>Base: {html.escape(report.base)}</p>\n"
        f'<p class="found">{html.escape(report.sentence or "")}</p>\n'
        f'<img alt="{_shown(report)} over the settings" src="data:image/png;base64,'
        f'{base64.b64encode(picture).decode()}">\n'
        f'<div class="scroll"><table><tr>{"".join(f"<th>{html.escape(name)}</th>" for name in head)}</tr>\n'
        f"{cells}</table></div>\n<p>{CAPTION.format(drawn=drawn, unit=report.unit)}</p>\n{noise}"
        f"{f'<ul>{failed}</ul>' if failed else ''}</body></html>\n"
    )
