"""What happened in a run: put together for report.json, and shown as the closing table."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from loratune import console
from loratune.choices import BestOf
from loratune.errors import counted
from loratune.model.adapter.summary import AdapterSummary
from loratune.model.memory import peak_memory_bytes
from loratune.printable import as_far_as_said
from loratune.runs.going_on import next_command
from loratune.runs.report import (
    AdapterCounts,
    AdapterGroup,
    Answers,
    ExactAnswers,
    ExpertUse,
    Health,
    Losses,
    Report,
    RowCounts,
    Told,
    Updates,
    ValidationLosses,
)
from loratune.runs.state import evaluation_command, merging_command, serving_command
from loratune.runs.versions import library_versions
from loratune.training.callbacks import Metrics
from loratune.training.checkpoints.best import Validation, best_of, judged_by, validations
from loratune.training.checkpoints.keeper import CheckpointKeeper
from loratune.training.failures import attempted

if TYPE_CHECKING:
    from loratune.training.session import Session
    from loratune.training.trainer import AdapterTrainer

Part = TypeVar("Part")
STOPPED: dict[BestOf, str] = {
    "loss": "the validation loss no longer fell",
    "exact": "no more answers were exact, and the validation loss no longer fell",
}
SHOWN: dict[str, Callable[[Told], str]] = {
    "  asked": lambda one: one.question,
    "  base": lambda one: as_far_as_said(one.base, one.base_ended),
    "  adapter": lambda one: as_far_as_said(one.adapter, one.ended is True),
}
"""What the closing table says of one question."""
SHOWN_LETTERS = 140
ROWS: dict[str, Callable[[Report], str | None]] = {
    "steps": lambda it: f"{it.steps} ({counted(it.epochs, 'epoch')}) in {it.seconds:.0f} s" if it.seconds else None,
    "training loss": lambda it: f"{it.loss.first:.4f} → {it.loss.last:.4f}" if it.loss else None,
    "validation loss": lambda it: _validation_text(it.validation_loss) if it.validation_loss else None,
    "exact answers": lambda it: _exact_text(it.exact_answers) if it.exact_answers else None,
    "best": lambda it: _disagreement(it),
    "stopped early": lambda it: STOPPED[it.best_by or "loss"] if it.stopped_early else None,
    "speed": lambda it: f"{it.tokens_per_second:g} tokens/s" if it.tokens_per_second else None,
    "start-up": lambda it: _stages_text(it.start_up_seconds) if it.start_up_seconds else None,
    "peak memory": lambda it: _memory_text(it) if it.peak_memory_bytes else None,
    "experts": lambda it: _experts_text(it.health.expert_use) if it.health and it.health.expert_use else None,
    "update": lambda it: _update_text(it.health.updates) if it.health and it.health.updates else None,
}
"""Of the closing table: what it says of a report, or None where there is nothing to say."""


def report_of(session: Session, trainer: AdapterTrainer, metrics: Metrics, keeper: CheckpointKeeper) -> Report:
    """What happened in a run, but for its health; what cannot be told is None.

    Losses are in nats per answer token, memory in bytes, speed in tokens per second without padding.
    """
    data, measured = session.data, validations(metrics)
    kept = keeper.best.step if keeper.best_checkpoint and keeper.best else measured[-1].step if measured else None

    def told(name: str, make: Callable[[], Part]) -> Part | None:
        return attempted(f"{name} of the report", make, session.notes.warn)

    report = Report(
        output=str(session.output),
        base=session.recipe.model.base,
        steps=trainer.state.global_step,
        epochs=round(trainer.state.epoch or 0, 3),
        stopped_early=keeper.stopped_early,
        rows=RowCounts(len(data.train), len(data.validation) if data.validation else 0),
        loss=told("loss", lambda: _loss(metrics.of("loss"))),
        validation_loss=told("validation_loss", lambda: _losses(measured, kept)),
        exact_answers=told("exact_answers", lambda: _exact(metrics, measured, kept)),
        best_by=judged_by(keeper.best, keeper.best_by) if keeper.best else None,
        seconds=told("seconds", lambda: metrics.records[-1]["seconds"]),
        tokens=told("tokens", lambda: int(metrics.of("tokens")[-1][1])),
        tokens_per_second=told("tokens_per_second", lambda: metrics.tokens_per_second),
        predicted_memory_bytes=session.prediction.counted_bytes if session.prediction else None,
        predicted_memory=session.prediction.terms if session.prediction else None,
        peak_memory_bytes=told("peak_memory_bytes", lambda: peak_memory_bytes(session.hardware)),
        gradient_checkpointing=session.arguments.gradient_checkpointing,
        start_up_seconds=dict(session.start_up.seconds),
        adapter=AdapterCounts(**vars(session.summary) | {"groups": _groups(session.summary)}),
        base_groups=session.weights.groups,
        quantization=session.weights.effect,
        versions=told("versions", library_versions),
        checks=session.checked.checks,
    )
    return replace(report, warnings=tuple(session.notes.told))


def _loss(losses: list[tuple[int, float]]) -> Losses:
    return Losses(first=losses[0][1], last=losses[-1][1])


def _losses(measured: list[Validation], kept: int | None) -> ValidationLosses | None:
    if kept is None:
        return None
    lowest = best_of(measured, "loss")
    return ValidationLosses(
        before=measured[0].loss,
        after=next(one.loss for one in measured if one.step == kept),
        best=lowest.loss if lowest else None,
        best_step=lowest.step if lowest else None,
        adapter_step=kept,
    )


def _exact(metrics: Metrics, measured: list[Validation], kept: int | None) -> ExactAnswers | None:
    most = best_of([one for one in measured if one.exact is not None], "exact")
    after = next((one.exact for one in measured if one.step == kept), None)
    if most is None or most.exact is None or after is None:
        return None
    answers = int(metrics.of("answers")[-1][1])
    return ExactAnswers(answers, measured[0].exact, after, most.exact, most.step)


def show_report(report: Report) -> None:
    """The closing table, and what to type next."""
    rows = [(name, text) for name, say in ROWS.items() if (text := say(report)) is not None]
    health = report.health or Health()
    rows += _answer_rows(health.answers)
    rows.append(("run folder", report.output))
    console.table(rows, title="done")
    for sentence in health.sentences:
        console.warn(sentence)
    output = Path(report.output)
    commands = (next_command(output, "finished"), evaluation_command(output), merging_command(output))
    # Serving may be the same merge, with the reason for it.
    for command in {one.words: one for one in (*commands, serving_command(output)) if one}.values():
        console.next_step(command)


def _answer_rows(answers: Answers | None) -> list[tuple[str, str]]:
    """How the questions went, and one of them word for word."""
    if answers is None or not answers.told:
        return []
    summary = f"{answers.changed} of {len(answers.told)} differ from the base's"
    if answers.judged:
        seen = "" if answers.judged == len(answers.told) else " with enough time and tokens"
        summary += f", {answers.ended} of {answers.judged}{seen} end by themselves"
    if answers.cut_short:
        summary += f", {answers.cut_short} cut short for time, the base's or the adapter's (evaluation.questions_share)"
    shown = next((one for one in answers.told if one.has_changed), answers.told[0])
    said = [(name, _one_line(text(shown))) for name, text in SHOWN.items()]
    return [("answers", summary), *said]


def _one_line(text: str) -> str:
    return textwrap.shorten(text, SHOWN_LETTERS, placeholder=" …") or "(nothing)"


def _experts_text(use: ExpertUse) -> str:
    return f"{use.used} of {use.all} got tokens in training"


def _groups(summary: AdapterSummary) -> dict[str, AdapterGroup]:
    return {role: AdapterGroup(**vars(group)) for role, group in summary.groups.items()}


def _validation_text(losses: ValidationLosses) -> str:
    return f"{losses.before:.4f} → {losses.after:.4f}, adapter of step {losses.adapter_step}"


def _exact_text(exact: ExactAnswers) -> str:
    before = f"{exact.before:.1%} → " if exact.before is not None else ""
    return f"{before}{exact.after:.1%} of {counted(exact.answers, 'validation answer')}"


def _disagreement(report: Report) -> str | None:
    """Say which validation counts as the best where loss and exact answers disagree."""
    loss, exact = report.validation_loss, report.exact_answers
    if loss is None or exact is None or loss.best is None or loss.best_step == exact.best_step:
        return None
    lowest = f"step {loss.best_step}, with the lowest loss ({loss.best:.4f})"
    most = f"step {exact.best_step}, with most exact answers ({exact.best:.1%})"
    taken, other, by_other = (lowest, most, "exact") if report.best_by == "loss" else (most, lowest, "loss")
    return f"{taken}; checkpoints.best_by {by_other} would take {other}"


def _memory_text(report: Report) -> str:
    peak, predicted = report.peak_memory_bytes or 0, report.predicted_memory_bytes
    text = console.memory(peak)
    return f"{text}, {console.memory(predicted)} predicted ({predicted / peak - 1:+.0%})" if predicted else text


def _stages_text(stages: Mapping[str, float]) -> str:
    return f"{sum(stages.values()):.0f} s: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in stages.items())


def _update_text(updates: Mapping[str, Updates]) -> str:
    """Where the adapter changes most, in relation to what is there."""
    medians = [size.median for size in updates.values()]
    name, most = max(((name, size.largest) for name, size in updates.items()), key=lambda pair: pair[1])
    return f"{min(medians):.2%} to {max(medians):.2%} of the weights' norm, at most {most:.2%} ({name})"
