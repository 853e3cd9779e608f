"""Plots the results of the comparison of defaults."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

PANELS = {"unseen": "unseen rows", "other": "unseen rows in another language", "code": "source code"}
TICKS = (0.001, 0.003, 0.01, 0.03)
MARKERS, COLOURS = "osD^", ("#2b5c9e", "#d1495b", "#4f8a4c", "#9a9a9a")


def plot_defaults(points: dict[str, list[tuple[float, dict[str, float]]]], path: Path) -> None:
    """Plot the change of each loss over alpha × learning rate, with a point for each run.

    Args:
        points: model → (alpha × learning rate, text → change of its loss in nats) of each run.
        path: output file.
    """
    figure = Figure(figsize=(11, 3.6), layout="constrained", dpi=110)
    for axes, (text, title) in zip(figure.subplots(1, 3), PANELS.items(), strict=True):
        for (model, runs), marker, colour in zip(points.items(), MARKERS, COLOURS, strict=False):
            paces, changes = [pace for pace, _ in runs], [change[text] for _, change in runs]
            axes.plot(paces, changes, marker, color=colour, alpha=0.7, label=model)
            means = {pace: [c for p, c in zip(paces, changes, strict=True) if p == pace] for pace in sorted({*paces})}
            axes.plot(list(means), [sum(some) / len(some) for some in means.values()], color=colour, alpha=0.5)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xscale="log", xlabel="alpha × learning rate", title=title)
        axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("change of the loss (nats per token)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path)
