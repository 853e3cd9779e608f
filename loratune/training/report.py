"""What happened in a run: report.json, loss.png, and the closing table."""

from __future__ import annotations

import shlex
import textwrap
from typing import TYPE_CHECKING, Any

from loratune import console
from loratune.model.memory import peak_memory_bytes
from loratune.runs.folder import PLOT, REPORT
from loratune.runs.versions import library_versions
from loratune.training.callbacks import Metrics
from loratune.training.checkpoints import CheckpointKeeper
from loratune.training.health import Health
from loratune.training.plot import plot_losses
from loratune.writing import write_json

if TYPE_CHECKING:
    from loratune.training.session import Session
    from loratune.training.trainer import AdapterTrainer


SHOWN = {"  asked": "question", "  base": "base", "  adapter": "adapter"}
"""What the closing table says of one question."""
SHOWN_LETTERS = 140


def write_report(
    session: Session, trainer: AdapterTrainer, metrics: Metrics, keeper: CheckpointKeeper, health: Health
) -> dict[str, Any]:
    """Put together what happened, write report.json and loss.png, and return the report.

    Losses are in nats per answer token, memory in bytes, speed in tokens per second without padding.
    """
    losses, validations = metrics.of("loss"), metrics.of("validation_loss")
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
        "loss": {"first": losses[0][1], "last": losses[-1][1]},
        "validation_loss": _validation(validations, keeper) if validations else None,
        "seconds": metrics.records[-1]["seconds"],
        "tokens": int(metrics.of("tokens")[-1][1]),
        "tokens_per_second": metrics.tokens_per_second,
        "peak_memory_bytes": peak_memory_bytes(session.hardware),
        "gradient_checkpointing": session.arguments.gradient_checkpointing,
        "start_up_seconds": session.start_up.seconds,
        "adapter": vars(session.summary),
        "health": health.as_json(),
        "warnings": session.warnings,
        "versions": library_versions(),
    }
    write_json(session.output / REPORT, report)
    plot_losses(metrics, session.output / PLOT)
    return report


def _validation(validations: list[tuple[int, float]], keeper: CheckpointKeeper) -> dict[str, Any]:
    taken_step = keeper.best_step if keeper.best_checkpoint and keeper.best_step else validations[-1][0]
    return {
        "before": validations[0][1],
        "after": dict(validations)[taken_step],
        "best": keeper.best_loss,
        "best_step": keeper.best_step,
        "adapter_step": taken_step,
    }


def show_report(report: dict[str, Any]) -> None:
    """The closing table, and what to type next."""
    rows = [("steps", f"{report['steps']} ({report['epochs']:g} epochs) in {report['seconds']:.0f} s")]
    rows.append(("training loss", f"{report['loss']['first']:.4f} → {report['loss']['last']:.4f}"))
    validation = report["validation_loss"]
    if validation:
        taken = f", adapter of step {validation['adapter_step']}"
        rows.append(("validation loss", f"{validation['before']:.4f} → {validation['after']:.4f}{taken}"))
    if report["stopped_early"]:
        rows.append(("stopped early", "the validation loss no longer fell"))
    rows.append(("speed", f"{report['tokens_per_second']:g} tokens/s"))
    stages = report["start_up_seconds"]
    rows.append(("start-up", f"{sum(stages.values()):.0f} s: " + ", ".join(f"{k} {v:.1f}" for k, v in stages.items())))
    rows.append(("peak memory", console.memory(report["peak_memory_bytes"])))
    rows.append(("update", _update_text(report["health"]["updates"])))
    rows += _answer_rows(report["health"]["answers"])
    rows.append(("run folder", report["output"]))
    console.table(rows, title="done")
    for sentence in report["health"]["sentences"]:
        console.warn(sentence)
    console.next_step(f"next: loratune infer --adapter {shlex.quote(report['output'])}")


def _answer_rows(answers: dict[str, Any] | None) -> list[tuple[str, str]]:
    """How the questions went, and one of them word for word."""
    if not answers or not answers["told"]:
        return []
    told = answers["told"]
    summary = f"{answers['changed']} of {len(told)} differ from the base's"
    if answers["judged"]:
        summary += f", {answers['ended']} of {answers['judged']} end by themselves"
    shown = next((one for one in told if one["has_changed"]), told[0])
    said = [(name, _one_line(shown[key])) for name, key in SHOWN.items()]
    return [("answers", summary), *said]


def _one_line(text: str) -> str:
    return textwrap.shorten(text, SHOWN_LETTERS, placeholder=" …") or "(nothing)"


def _update_text(updates: dict[str, dict[str, Any]]) -> str:
    """Where the adapter changes most, in relation to what is there."""
    medians = [size["median"] for size in updates.values()]
    name, most = max(((name, size["largest"]) for name, size in updates.items()), key=lambda pair: pair[1])
    return f"{min(medians):.2%} to {max(medians):.2%} of the weights' norm, at most {most:.2%} ({name})"
