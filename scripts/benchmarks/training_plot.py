"""Plots the results of the training benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLOURS = {"TRL": "#9a9a9a", "loratune": "#2b5c9e"}


def plot_training(figures: dict[str, Any], path: Path) -> None:
    """Plot speed, memory and loss curves of TRL and loratune.

    Args:
        figures: the benchmark's JSON.
        path: output file.
    """
    figure = Figure(figsize=(11, 3.6), layout="constrained", dpi=120)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1, 2])
    runs = figures["runs"]
    _bars(left, "tokens/s", {name: max(one["tokens"] / one["seconds"] for one in all_) for name, all_ in runs.items()})
    rate = figures["products_tokens_per_second"]
    left.axhline(rate, color="#d1495b", linestyle=":")
    left.annotate("frozen matrix products alone", (0.5, rate), color="#d1495b", ha="center", va="bottom", fontsize=8)
    left.set_ylim(0, 1.15 * rate)
    _bars(middle, "peak memory, GB", {name: max(one["resident"] for one in all_) / 1e9 for name, all_ in runs.items()})
    for name, all_ in runs.items():
        losses = all_[-1]["losses"]
        label = f"{name}: {figures['nll'][name]:.4f} on unseen rows"
        right.plot(range(1, len(losses) + 1), losses, color=COLOURS[name], label=label)
    right.set(xlabel="step", title="loss per answer token (nats), each step on its own rows")
    right.margins(y=0.25)
    right.legend(frameon=False, loc="upper left")
    right.grid(alpha=0.25)
    figure.savefig(path)


def _bars(axes: Any, title: str, values: dict[str, float]) -> None:
    bars = axes.bar(list(values), list(values.values()), color=[COLOURS[name] for name in values])
    axes.bar_label(bars, fmt="%.3g")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
