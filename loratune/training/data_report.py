"""The report of `loratune data check`: files, rows, findings, lengths, and training steps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypedDict

from loratune import console
from loratune.data.assembly.packing import padding_efficiency
from loratune.data.assembly.split import Split
from loratune.data.checks.findings import Found
from loratune.data.preparation import FileUse, PreparedData
from loratune.data.template.reasoning_form import ReasoningForm
from loratune.data.template.thinking import Reasoning
from loratune.errors import counted
from loratune.recipe.loading import shipped_rows
from loratune.recipe.sections import Recipe, TrainingSettings
from loratune.training.steps import plan_steps

BARS = 10
"""Maximum number of histogram lines, plus one for the longest 1 % of the rows."""
SAMPLED_SEQUENCES = 20_000
NICE_STEPS = (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500)


class SplitFigures(TypedDict):
    """The rows of a split; lengths in tokens."""

    rows: int
    sequences: int
    """Of which a row may make several."""
    tokens: int
    trained_tokens: int
    shortest: int
    median: int
    longest: int


Bin = TypedDict("Bin", {"from": int, "to": int, "rows": int})


class TrainingFigures(TypedDict):
    """The steps that the rows make."""

    tokens_per_epoch: int
    rows_per_step: int
    steps_per_epoch: int
    steps: int
    padded_efficiency: float
    """Share of the positions of a padded step that would carry tokens."""


class OwnForm(TypedDict):
    """The template's text around reasoning."""

    before: str
    after: str


class DataReport(TypedDict):
    """What `sft` would make of the rows; lengths in tokens."""

    files: list[FileUse]
    template: str
    """prompt.template: chat is the tokenizer's own."""
    rows: dict[str, SplitFigures]
    """training, and validation if there is any."""
    histogram: list[Bin]
    """Lengths of the training sequences; both ends are inclusive."""
    training: TrainingFigures
    reasoning: Reasoning | None
    """How prompts ask for reasoning; null for templates without a thinking mode."""
    reasoning_form: OwnForm | None
    """null if it is that of rows, or not known."""
    findings: list[Found]
    refused: bool
    """Whether a finding's level is refuse; the exit code is 3 then."""


def data_report(recipe: Recipe, data: PreparedData) -> DataReport:
    """Return the report. Lengths are in tokens."""
    splits = {"training": data.train} | ({"validation": data.validation} if data.validation else {})
    return {
        "files": data.files,
        "template": data.prompt.template,
        "rows": {name: _split_figures(split) for name, split in splits.items()},
        "histogram": histogram(data.train.lengths),
        "training": _training_figures(recipe.training, data.train, recipe.seed),
        "reasoning": data.reasoning,
        "reasoning_form": _own_form(data.reasoning_form),
        "findings": data.found,
        "refused": any(found.level == "refuse" for found in data.found),
    }


def histogram(lengths: NDArray[np.int64]) -> list[Bin]:
    """Return counts of lengths in bins of one round width; the last bin has all longer ones.

    Returns:
        `from` and `to` in tokens, both inclusive, and the number of `rows`.
    """
    usual = float(np.percentile(lengths, 99))
    scale = 10 ** max(0, int(np.log10(max(usual / BARS, 1))) - 1)
    width = next((step * scale for step in NICE_STEPS if step * scale * BARS >= usual), int(np.ceil(usual / BARS)))
    last = int(lengths.max())
    edges = np.append(np.arange(0, int(usual) + width, width), last) if last > usual else None
    edges = np.arange(0, last + width, width) if edges is None or edges[-2] >= last else edges
    counts, _ = np.histogram(lengths, edges + 1)
    first = int(np.flatnonzero(counts)[0])
    edges, counts = edges[first:], counts[first:]
    return [
        {"from": int(low) + 1, "to": int(high), "rows": int(count)}
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def show_data_report(report: DataReport) -> None:
    files = [(shipped_rows(use.path) or _short(use.path), _file_line(use)) for use in report["files"]]
    console.table(files, title="files")
    console.table([(name, _split_line(figures)) for name, figures in report["rows"].items()], title="rows")
    bars = [(f"{bar['from']}–{bar['to']}", bar["rows"]) for bar in report["histogram"]]
    console.bars(bars, title="tokens of a training row")
    figures = report["training"]
    console.table(
        [
            ("an epoch", f"{figures['tokens_per_epoch']:,} tokens, {counted(figures['steps_per_epoch'], 'step')} of "
             f"{counted(figures['rows_per_step'], 'row')}"),
            ("the run", counted(figures["steps"], "step")),
            ("padding", _padding_line(figures)),
        ],
        title="training",
    )  # fmt: skip
    reasoning = _reasoning_lines(report["reasoning"], report["reasoning_form"]) if report["reasoning"] else []
    template = report["template"]
    whose = "of the tokenizer" if template == "chat" else "of loratune"
    console.table([("template", f"{template}, {whose}"), *reasoning], title="prompts")
    for found in report["findings"]:
        show = {"refuse": console.error, "warn": console.warn}.get(found.level, console.say)
        show(found.text)
    refusing = [found.name for found in report["findings"] if found.level == "refuse"]
    if refusing:
        console.error(f"sft would refuse these rows: {', '.join(refusing)}")
    else:
        console.say("sft would train on these rows", style="bold")


def _own_form(form: ReasoningForm) -> OwnForm | None:
    """Return the text around reasoning in answers; None if it is that of rows, or not known."""
    return None if form.is_of_rows else {"before": form.opening, "after": form.closing + form.answer_start}


def _reasoning_lines(reasoning: Reasoning, form: OwnForm | None) -> list[tuple[str, str]]:
    """Return how prompts ask for reasoning; line breaks of the template are shown as escapes."""
    default = reasoning.by_default
    known = "; the template has no other mode" if default is None else f"; the template's default is {_mode(default)}"
    lines = [
        ("thinking", _mode(reasoning.is_enabled) + known),
        ("they end in", repr(reasoning.prompt_end) if reasoning.prompt_end else "no reasoning block"),
        ("earlier reasoning", "stays in them" if reasoning.keeps_earlier else "is left out"),
    ]
    if reasoning.answer_start:
        lines.append(("without reasoning", f"answers begin with {reasoning.answer_start!r}, which is trained"))
    if form:
        lines.append(("reasoning", f"is trained between {form['before']!r} and {form['after']!r}"))
    if reasoning.instruction:
        lines.append(("instruction", f"{reasoning.instruction!r} …"))
    return lines


def _mode(is_thinking: bool) -> str:
    return "on" if is_thinking else "off"


def _split_figures(split: Split) -> SplitFigures:
    lengths = split.lengths
    return {
        "rows": len(split.pool),
        "sequences": len(lengths),
        "tokens": split.tokens,
        "trained_tokens": split.trained_tokens,
        "shortest": int(lengths.min()),
        "median": int(np.median(lengths)),
        "longest": split.longest,
    }


def _training_figures(training: TrainingSettings, train: Split, seed: int) -> TrainingFigures:
    plan = plan_steps(training, len(train.lengths))
    return {
        "tokens_per_epoch": train.tokens,
        "rows_per_step": plan.rows_per_step,
        "steps_per_epoch": plan.steps_per_epoch,
        "steps": plan.steps,
        "padded_efficiency": _padded_efficiency(train.lengths, training, seed),
    }


def _padded_efficiency(lengths: NDArray[np.int64], training: TrainingSettings, seed: int) -> float:
    """Estimate the share of non-padding positions if a step were one padded batch; from a sample of many sequences."""
    if len(lengths) > SAMPLED_SEQUENCES:
        lengths = np.random.default_rng(seed).choice(lengths, SAMPLED_SEQUENCES, replace=False)
    return round(padding_efficiency(lengths, training.batch_size, seed), 4)


def _file_line(use: FileUse) -> str:
    names = [" ".join(name.split())[:30] for name in use.ignored]
    ignored = f"; ignored: {', '.join(names)}" if names else ""
    used = f"{use.rows:,} of " if use.rows != use.seen else ""
    shipped = "; shipped with loratune" if shipped_rows(use.path) else ""
    return f"{used}{counted(use.seen, 'row')}, {use.format}{ignored}{shipped}"


def _split_line(figures: SplitFigures) -> str:
    sequences = f" in {counted(figures['sequences'], 'sequence')}" if figures["sequences"] != figures["rows"] else ""
    return (
        f"{figures['rows']:,}{sequences}, {figures['tokens']:,} tokens "
        f"({figures['trained_tokens'] / figures['tokens']:.0%} trained); "
        f"{figures['shortest']} to {figures['longest']}, median {figures['median']}"
    )


def _padding_line(figures: TrainingFigures) -> str:
    return f"{1 - figures['padded_efficiency']:.0%} of a step's positions if rows are padded, none if packed"


def _short(path: str) -> str:
    """Return the end of a long path, so that the table keeps its width."""
    return path if len(path) <= 30 else f"…{path[-29:]}"
