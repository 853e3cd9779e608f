"""Plots losses, exact answers and the learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from loratune.training.callbacks import Metrics


def plot_losses(metrics: Metrics, path: Path) -> None:
    """Plot losses and learning rate over steps, and below them the share of exact answers, where it was measured."""
    figure = Figure(figsize=(8, 4.5), layout="constrained", dpi=120)
    exact = metrics.of("exact_answers")
    heights = [3, 1] if exact else [1]
    axes, *below = figure.subplots(len(heights), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for share in below:
        share.plot(*zip(*exact, strict=True), color="#d1495b", marker="o", markersize=4)
        share.set(ylabel="exact answers", ylim=(0, 1.05))
        share.grid(alpha=0.25)
    losses = metrics.of("loss")
    if losses:
        steps, values = zip(*losses, strict=True)
        axes.plot(steps, values, color="#9db8d9", linewidth=1, label="training loss")
        axes.plot(steps, _smooth(values), color="#2b5c9e", linewidth=2, label="training loss, smoothed")
    validations = metrics.of("validation_loss")
    if validations:
        axes.plot(*zip(*validations, strict=True), color="#d1495b", marker="o", markersize=4, label="validation loss")
    axes.set(ylabel="loss per answer token (nats)")
    figure.axes[-1].set_xlabel("step")
    axes.grid(alpha=0.25)
    axes.set_ylim(bottom=0)
    rates = metrics.of("learning_rate")
    if rates:
        right = axes.twinx()
        right.plot(*zip(*rates, strict=True), color="#888888", linestyle=":", linewidth=1.2, label="learning rate")
        right.set_ylabel("learning rate")
        right.set_ylim(bottom=0)
        handles = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
        axes.legend(handles=handles, loc="upper right", frameon=False)
    figure.savefig(path)


def _smooth(values: tuple[float, ...]) -> list[float]:
    """Return the exponential moving average over about 5 % of the run."""
    weight = 2 / (max(len(values) / 20, 1) + 1)
    smoothed = [values[0]]
    for value in values[1:]:
        smoothed.append(weight * value + (1 - weight) * smoothed[-1])
    return smoothed
