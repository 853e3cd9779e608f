"""Writes report.json and prints the closing table."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune import console
from loratune.model.memory import peak_memory_bytes
from loratune.runs.folder import REPORT
from loratune.runs.state import next_command
from loratune.runs.versions import library_versions
from loratune.training.callbacks import Metrics
from loratune.training.checkpoints.keeper import CheckpointKeeper
from loratune.training.failures import attempted
from loratune.writing import write_json

if TYPE_CHECKING:
    from loratune.training.run import Session
    from loratune.training.trainer import AdapterTrainer


SHOWN = {"  asked": "question", "  base": "base", "  adapter": "adapter"}
"""Labels of a sample generation in the closing table."""
SHOWN_LETTERS = 140
ROWS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any]], str]]] = {
    "steps": (("seconds",), lambda it: f"{it['steps']} ({it['epochs']:g} epochs) in {it['seconds']:.0f} s"),
    "training loss": (("loss",), lambda it: f"{it['loss']['first']:.4f} → {it['loss']['last']:.4f}"),
    "validation loss": (("validation_loss",), lambda it: _validation_text(it["validation_loss"])),
    "stopped early": (("stopped_early",), lambda _: "the validation loss no longer fell"),
    "speed": (("tokens_per_second",), lambda it: f"{it['tokens_per_second']:g} tokens/s"),
    "start-up": (("start_up_seconds",), lambda it: _stages_text(it["start_up_seconds"])),
    "peak memory": (("peak_memory_bytes",), lambda it: console.memory(it["peak_memory_bytes"])),
    "update": (("health",), lambda it: _update_text(it["health"]["updates"])),
}
"""Rows of the closing table: the keys that each needs from the report, and its text."""


def write_report(
    session: Session, trainer: AdapterTrainer, metrics: Metrics, keeper: CheckpointKeeper
) -> dict[str, Any]:
    """Assemble the report, write report.json, and return it; parts that fail are None.

    Losses are in nats per answer token, memory in bytes, speed in tokens per second without padding.
    """
    data = session.data
    report = {
        "state": "finished",
        "output": str(session.output),
        "base": session.recipe.model.base,
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch or 0, 3),
        "stopped_early": keeper.stopped_early,
        "rows": {
            "training": len(data.train),
            "validation": len(data.validation) if data.validation else 0,
        },
    }
    parts: dict[str, Callable[[], Any]] = {
        "loss": lambda: _loss(metrics.of("loss")),
        "validation_loss": lambda: _validation(metrics.of("validation_loss"), keeper),
        "seconds": lambda: metrics.records[-1]["seconds"],
        "tokens": lambda: int(metrics.of("tokens")[-1][1]),
        "tokens_per_second": lambda: metrics.tokens_per_second,
        "peak_memory_bytes": lambda: peak_memory_bytes(session.hardware),
        "gradient_checkpointing": lambda: session.arguments.gradient_checkpointing,
        "start_up_seconds": lambda: session.start_up.seconds,
        "adapter": lambda: vars(session.summary),
        "versions": library_versions,
    }
    for name, make in parts.items():
        report[name] = attempted(f"{name} of the report", make, session.notes.warn)
    report |= {"health": None, "warnings": session.notes.told}
    write_json(session.output / REPORT, report)
    return report


def _loss(losses: list[tuple[int, float]]) -> dict[str, float]:
    return {"first": losses[0][1], "last": losses[-1][1]}


def _validation(validations: list[tuple[int, float]], keeper: CheckpointKeeper) -> dict[str, Any] | None:
    if not validations:
        return None
    taken_step = keeper.best_step if keeper.best_checkpoint and keeper.best_step else validations[-1][0]
    return {
        "before": validations[0][1],
        "after": dict(validations)[taken_step],
        "best": keeper.best_loss,
        "best_step": keeper.best_step,
        "adapter_step": taken_step,
    }


def show_report(report: dict[str, Any]) -> None:
    """Print the closing table and the next command."""
    rows = [(name, text(report)) for name, (parts, text) in ROWS.items() if all(report.get(part) for part in parts)]
    health = report["health"] or {"answers": None, "sentences": []}
    rows += _answer_rows(health["answers"])
    rows.append(("run folder", report["output"]))
    console.table(rows, title="done")
    for sentence in health["sentences"]:
        console.warn(sentence)
    console.next_step(str(next_command(Path(report["output"]), "finished")))


def _answer_rows(answers: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return the summary of the sample generations, and one of them."""
    if not answers or not answers["told"]:
        return []
    told = answers["told"]
    summary = f"{answers['changed']} of {len(told)} differ from the base's"
    if answers["judged"]:
        summary += f", {answers['ended']} of {answers['judged']} end by themselves"
    if answers.get("cut_short"):
        summary += f", {answers['cut_short']} cut short for time (evaluation.questions_share)"
    shown = next((one for one in told if one["has_changed"]), told[0])
    said = [(name, _one_line(shown[key])) for name, key in SHOWN.items()]
    return [("answers", summary), *said]


def _one_line(text: str) -> str:
    return textwrap.shorten(text, SHOWN_LETTERS, placeholder=" …") or "(nothing)"


def _validation_text(validation: dict[str, Any]) -> str:
    return f"{validation['before']:.4f} → {validation['after']:.4f}, adapter of step {validation['adapter_step']}"


def _stages_text(stages: dict[str, float]) -> str:
    return f"{sum(stages.values()):.0f} s: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in stages.items())


def _update_text(updates: dict[str, dict[str, Any]]) -> str:
    """Describe the range of the relative update sizes, and the largest one."""
    medians = [size["median"] for size in updates.values()]
    name, most = max(((name, size["largest"]) for name, size in updates.items()), key=lambda pair: pair[1])
    return f"{min(medians):.2%} to {max(medians):.2%} of the weights' norm, at most {most:.2%} ({name})"
