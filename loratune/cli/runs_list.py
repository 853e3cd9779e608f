"""`loratune runs list`: lists runs, merged models and exports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

from loratune.board.layout import RunsList
from loratune.board.search import Found, Search
from loratune.board.summary import DAMAGED, RunSummary
from loratune.board.table import show_list
from loratune.cli.documents import Document
from loratune.errors import Exit, LoratuneError

DOCUMENT = Document("runs-list", 1, lambda: RunsList)
State = Literal["running", "finished", "interrupted", "crashed", "diverged", "failed", "damaged"]
Order = Literal["age", "name", "loss", "size"]
assert DAMAGED in get_args(State)
DETAILS = """\
Looks for runs below the folders, also in those of sweeps, and reads their small files only. Losses are in nats per
token; `valid.` is the validation loss of the adapter that was kept, or the newest while it is trained. The verdict of
an evaluation, and what a run was merged or exported into, are found by the hashes of its adapter, whatever the folders
are called. Files that are missing or have another size are named; `loratune runs show` compares the hashes.

A folder that is damaged has a line that says why."""
ORDERS: dict[Order, Callable[[RunSummary], Any]] = {
    "age": lambda run: 0,  # as they are found, the newest first
    "name": lambda run: run.name,
    "loss": lambda run: (_or_last(run.validation_loss), _or_last(run.loss)),
    "size": lambda run: -run.bytes,
}


def command(
    folders: Annotated[list[Path] | None, typer.Argument(help="Folders with runs.", show_default="out")] = None,
    tag: Annotated[
        list[str] | None, typer.Option("--tag", metavar="name", help="Only runs with this tag. Repeatable.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", metavar="text", help="Only runs whose base has this in its name.")
    ] = None,
    state: Annotated[
        list[str] | None,
        typer.Option("--state", metavar="|".join(get_args(State)), help="Only runs in this state. Repeatable."),
    ] = None,
    sort: Annotated[str, typer.Option("--sort", metavar="|".join(get_args(Order)), help="What comes first.")] = "age",
    json: Annotated[bool, typer.Option("--json", help="Print the list as JSON to stdout.")] = False,
) -> None:
    _check("--sort", [sort], get_args(Order))
    _check("--state", state or [], get_args(State))
    order = next(make for name, make in ORDERS.items() if name == sort)

    def is_wanted(run: RunSummary) -> bool:
        has_tags = set(tag or ()) <= set(run.tags)
        has_base = base is None or base.casefold() in (run.base or "").casefold()
        return has_tags and has_base and (not state or run.state in state)

    is_filtered = bool(tag or base or state)
    told: list[dict[str, Any]] = []
    for folder in folders or [Path("out")]:
        found = Search(folder).find()
        runs = sorted(filter(is_wanted, found.runs), key=order)
        told.append(_values(folder, found, runs))
        if not json:
            show_list(found, runs, folder, with_models=not is_filtered)
    if json:
        DOCUMENT.write({"folders": told})


def _values(folder: Path, found: Found, runs: list[RunSummary]) -> dict[str, Any]:
    values = found.values()
    return {**values, "folder": str(folder), "runs": [found.run_values(run) for run in runs]}


def _or_last(loss: float | None) -> float:
    return float("inf") if loss is None else loss


def _check(flag: str, given: list[str], known: tuple[str, ...]) -> None:
    if wrong := [value for value in given if value not in known]:
        raise LoratuneError(f"{flag} {wrong[0]}: there are {', '.join(known)}", Exit.USAGE)
