"""`loratune plan`: predicts the memory of a training from its recipe and the base's config, without weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from loratune import console
from loratune.cli.documents import Document
from loratune.cli.flags import Config
from loratune.cli.options import recipe_options
from loratune.errors import Exit, LoratuneError
from loratune.recipe.loading import load_recipe
from loratune.sizes import parse_size

DETAILS = """\
Runs the recipe's largest pass on tensors without values and counts what it holds. Needs the base's config, and its
tokenizer to measure the rows; of a hub id, nothing else is downloaded. Without --gpu, the memory that this machine has
free counts. Every setting of the recipe is also a flag.

If it does not fit, the exit code is 6, and the changes that help are listed, the cheapest first, each computed anew."""

CARD = (10**6, 10**13)
"""Bounds of a card's memory in bytes; what is beyond them is a number without its unit, or with a wrong one."""
MEMORY = "the memory of a card, such as 24GB or 80GiB"


def _printed() -> Any:
    from loratune.training.memory.plan import PlanValues

    return PlanValues


DOCUMENT = Document("plan", 1, _printed)


@recipe_options
def command(
    config: Config = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="size", help="Memory of a card, such as 24GB or 80GiB.")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", metavar="integer", min=1, max=1024, help="Number of cards, each with a process."),
    ] = None,
    fit: Annotated[
        Path | None, typer.Option("--fit", metavar="file", help="Write the recipe with the changes that make it fit.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON to stdout.")] = False,
    *,
    flags: dict[str, object],
) -> None:
    card = None if gpu is None else (gpu, parse_size(gpu, "--gpu", *CARD, MEMORY))
    if fit is not None and fit.exists():
        raise LoratuneError(f"{fit} exists; --fit writes a new file", Exit.USAGE)
    recipe = load_recipe(config, dict(flags))
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with console.status("starting"):
        from loratune.training.memory.plan import plan, show_plan, write_fitted
        from loratune.training.memory.planning import place_of

    found = plan(recipe, place_of(card, gpus), is_here=card is None)
    if fit is not None:
        write_fitted(found, fit)
    if json:
        DOCUMENT.write(found.values())
    else:
        show_plan(found, config, flags, fit)
    if not found.fits and fit is None:
        raise typer.Exit(int(Exit.IO))
