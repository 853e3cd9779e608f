"""`loratune runs show`: shows a run's state, or where a model comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from loratune import console
from loratune.board.layout import ShownModel, ShownRun
from loratune.board.lineage import model_state, run_lineage
from loratune.board.opened import find_model
from loratune.cli.documents import Document
from loratune.errors import counted
from loratune.runs.going_on import next_command
from loratune.runs.state import run_state

BASES = {
    "every byte": "identified by a hash of all its weights",
    "sampled": "identified by samples: 4096 bytes of each tensor",
    "nothing": "not identified",
}
DOCUMENT = Document("runs-show", 1, lambda: ShownRun | ShownModel)
DETAILS = """\
A run that is marked as running but has no process has crashed; it can be resumed.

Of a merged model or an export it shows the run whose adapter is in it, and of a run the evaluations, merged models and
exports of its adapter: those within its folder and beside it, found by hash. All files are compared with their hashes,
also the rows, where they still lie where they lay."""


def command(
    run: Annotated[Path, typer.Argument(help="Run folder, merged model or export.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print the state as JSON to stdout.")] = False,
) -> None:
    model = find_model(run)
    state: dict[str, Any] = model_state(model) if model else {**run_state(run), **run_lineage(run)}
    if json:
        DOCUMENT.write(state)
        return
    rows = _model_rows(state) if model else [*_rows(state), *_lineage_rows(state)]
    console.table(rows, title=state["output"], is_result=True)
    if not model and (advised := next_command(run, state["state"])):
        console.next_step(advised)


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
    steps = state["checkpoints"]
    at = f"{len(steps)}, at {'step' if len(steps) == 1 else 'steps'} {', '.join(map(str, steps))}"
    changed = f"changed since: {', '.join(state['changed'])}; commands that read these files refuse the run"
    return [
        *rows,
        ("checkpoints", at if steps else "none"),
        ("files", changed if state["changed"] else "unchanged"),
        ("base", BASES[state["base_checked"]]),
    ]


def _lineage_rows(state: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("data", f"{file['path']}, {counted(file['rows'], 'row')}: {file['now']}") for file in state["data"]]
    rows += [("tags", ", ".join(state["tags"]))] if state["tags"] else []
    rows += [("evaluation", _evaluation(one)) for one in state["evaluations"]]
    return [*rows, *((one["kind"], _made(one)) for one in state["models"])]


def _evaluation(one: dict[str, Any]) -> str:
    others = (*filter(None, [one["objection"]]), *(one["fallen"] or {}).values())
    return "; ".join((f"{one['name']}: {one['verdict']}", str(one["sentence"]), *others))


def _made(model: dict[str, Any]) -> str:
    told = [model["name"]]
    told += ["another base than the run's"] if model["has_base_of_run"] is False else []
    told += [f"changed: {', '.join(model['changed'])}"] if model["changed"] else []
    return "; ".join(told)


def _model_rows(state: dict[str, Any]) -> list[tuple[str, str]]:
    unchanged = "no hashes were recorded" if state["changed"] is None else "unchanged"
    changed = ", ".join(state["changed"] or ()) or unchanged
    told = {name: state[name] for name in ("kind", "origin", "base", "verified")}
    return [*((name, value) for name, value in told.items() if value), ("files", changed)]
