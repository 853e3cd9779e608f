"""Plots as inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from loratune.evaluation.result import GeneralText
from loratune.evaluation.verdict import LANGUAGES

WIDTH = 680
BARS_HEIGHT = 180
LINE_HEIGHT = 46
LEFT, RIGHT = 110, 90
BARS_LEFT = 76
"""Room for `-12.34` in the letters of a narrow window, which are larger because the plot is drawn smaller."""
LETTERS = 20
"""Height of these letters; labels that are nearer to each other would overlap."""
WIDEST_BAR = 24.0


def gains_plot(gains: Sequence[float], title: str) -> str:
    """Return a bar per row, from the row that lost most to the one that gained most.

    Args:
        gains: by how much the tuned model is better, per row; at least one.
        title: what a gain is, for readers of the text.
    """
    ordered = sorted(gains)
    top, bottom = max(0.0, ordered[-1]), min(0.0, ordered[0])
    scale = (BARS_HEIGHT - 20) / ((top - bottom) or 1.0)
    step = (WIDTH - BARS_LEFT) / len(ordered)
    width, zero = max(0.5, min(WIDEST_BAR, step * 0.8)), 10 + top * scale
    left = BARS_LEFT + (step - width) / 2
    bars = "".join(
        f'<rect class="{"gain" if value > 0 else "loss"}" x="{left + place * step:.2f}" width="{width:.2f}" '
        f'y="{zero - max(value, 0) * scale:.2f}" height="{abs(value) * scale:.2f}"/>'
        for place, value in enumerate(ordered)
    )
    marks = "".join(
        f'<text x="{BARS_LEFT - 6}" y="{zero - value * scale + 4:.2f}" text-anchor="end">{value:+.2f}</text>'
        for value in (top, bottom)
        if abs(value) * scale > LETTERS
    )
    axis = f'<line class="axis" x1="{BARS_LEFT}" x2="{WIDTH}" y1="{zero:.2f}" y2="{zero:.2f}"/>'
    origin = f'<text x="{BARS_LEFT - 6}" y="{zero + 4:.2f}" text-anchor="end">0</text>'
    return _svg(BARS_HEIGHT, title, f"{bars}{axis}{marks}{origin}")


def forgetting_plot(texts: Mapping[str, GeneralText], bound: float) -> str:
    """Return a line per language from the baseline's loss on general text to the tuned model's, with the bound.

    Args:
        texts: language → comparison; at least one.
        bound: nats per token by which the loss may rise.
    """
    ends = [value for one in texts.values() for value in (one.loss.baseline, one.loss.tuned, one.loss.baseline + bound)]
    low, high = min(ends), max(ends)
    scale = (WIDTH - LEFT - RIGHT) / ((high - low) or 1.0)
    lines = ""
    for place, (language, one) in enumerate(texts.items()):
        start, end, limit = (
            LEFT + (value - low) * scale for value in (one.loss.baseline, one.loss.tuned, one.loss.baseline + bound)
        )
        y = 24 + place * LINE_HEIGHT
        kind = "loss" if one.loss.difference > bound else "gain"
        lines += (
            f'<text x="{LEFT - 14}" y="{y + 4}" text-anchor="end">{escape(LANGUAGES.get(language, language))}</text>'
            f'<line class="limit" x1="{limit:.1f}" x2="{limit:.1f}" y1="{y - 12}" y2="{y + 12}"/>'
            f'<line class="way {kind}" x1="{start:.1f}" x2="{end:.1f}" y1="{y}" y2="{y}"/>'
            f'<circle class="from" cx="{start:.1f}" cy="{y}" r="5"/>'
            f'<circle class="{kind}" cx="{end:.1f}" cy="{y}" r="5"/>'
            f'<text x="{max(start, end, limit) + 12:.1f}" y="{y + 4}">{one.loss.difference:+.3f}</text>'
        )
    return _svg(LINE_HEIGHT * len(texts), "loss of general text before and after, with the bound", lines)


def _svg(height: int, title: str, content: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{content}</svg>"
    )
