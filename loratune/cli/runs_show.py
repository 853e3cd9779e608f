"""`loratune runs show`: shows a run's state."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loratune import console
from loratune.runs.state import run_state

BASES = {
    "every byte": "identified by a hash of all its weights",
    "sampled": "identified by samples: 4096 bytes of each tensor",
    "nothing": "not identified",
}
DETAILS = "A run that is marked as running but has no process has crashed; it can be resumed."


def command(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print the state as JSON to stdout.")] = False,
) -> None:
    state = run_state(run)
    if json:
        console.write_json(state)
        return
    console.table(_rows(state), title=state["output"], is_result=True)
    if state["next"]:
        console.next_step(f"next: {state['next']}")


def _rows(state: dict[str, Any]) -> list[tuple[str, str]]:
    of = f" of {state['steps']}" if state["steps"] else ""
    rows = [("state", f"{state['state']} at step {state['step']}{of}, {state['time']}")]
    if state["loss"] is not None:
        rows.append(("training loss", f"{state['loss']:.4f}"))
    if state["validation_loss"] is not None:
        best = f", best {state['best_validation_loss']:.4f}"
        rows.append(("validation loss", f"{state['validation_loss']:.4f}{best}"))
    if state["exact_answers"] is not None:
        rows.append(("exact answers", f"{state['exact_answers']:.1%}, best {state['best_exact_answers']:.1%}"))
    checkpoints = ", ".join(str(step) for step in state["checkpoints"]) or "none"
    changed = f"changed since: {', '.join(state['changed'])}; commands that read these files refuse the run"
    return [
        *rows,
        ("checkpoints", checkpoints),
        ("files", changed if state["changed"] else "unchanged"),
        ("base", BASES[state["base_checked"]]),
    ]
