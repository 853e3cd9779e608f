"""`loratune sft`: trains an adapter, or a model's own weights, from a recipe."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typing_extensions import TypedDict

from loratune import console
from loratune.cli.documents import Document
from loratune.cli.flags import Config
from loratune.cli.options import recipe_options
from loratune.errors import Exit, LoratuneError
from loratune.imports import importing
from loratune.recipe.loading import dump_recipe, load_recipe, shipped_recipes
from loratune.recipe.sections import Recipe
from loratune.runtime import is_started_by_loratune

DETAILS = """\
Every setting of the recipe is also a flag; flags override the recipe, and the recipe overrides the
defaults. A list takes its flag once per value: --data.train a.json --data.train b.json. Shipped
recipes: """ + ", ".join(path.stem for path in shipped_recipes())


class ShownRecipe(TypedDict):
    """The resolved recipe, of --show."""

    recipe: Recipe


def _printed() -> Any:
    from loratune.runs.report import ReportFile

    return ReportFile | ShownRecipe


DOCUMENT = Document("sft", 1, _printed)


@recipe_options
def command(
    config: Config = None,
    gpus: Annotated[
        str | None,
        typer.Option(
            "--gpus",
            metavar="[N|auto]",
            help="Train on this many GPUs of this machine, or on all: one process each. The recipe's steps stay the "
            "same.",
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="[auto|step]",
            help="Continue the run in the output folder, from its newest checkpoint or the given one; auto starts it "
            "if there is no run yet.",
        ),
    ] = None,
    strict_resume: Annotated[
        bool, typer.Option("--strict-resume", help="Fail on a damaged checkpoint instead of using an older one.")
    ] = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume even if settings or data have changed.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing run in the output folder.")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="Print the resolved recipe and stop.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON to stdout.")] = False,
    *,
    flags: dict[str, object],
) -> None:
    recipe = load_recipe(config, dict(flags))
    if show and json:
        DOCUMENT.write(ShownRecipe(recipe=recipe))
        return
    if show:
        console.write_result(dump_recipe(recipe, is_ascii=not console.takes_all_characters()), end="")
        return
    if resume is None and (strict_resume or allow_changes):
        raise LoratuneError("--strict-resume and --allow-changes need --resume", Exit.USAGE)
    if resume is not None and overwrite:
        raise LoratuneError("--resume continues a run, --overwrite replaces it; give one of them", Exit.USAGE)
    if gpus is None or is_started_by_loratune() or not _launched(gpus, recipe):
        _train(recipe, overwrite, (resume, strict_resume, allow_changes) if resume is not None else None, json)


def _launched(gpus: str, recipe: Recipe) -> bool:
    """Run the command line in a process for each GPU; return False where this process is enough."""
    with console.status("starting"), importing():
        from loratune.training.processes.launcher import launch, processes_to_start

        count = processes_to_start(gpus)
    if count > 1:
        launch(count, sys.argv[1:], Path(recipe.output))
    return count > 1


def _train(recipe: Recipe, overwrite: bool, resume: tuple[str, bool, bool] | None, json: bool) -> None:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports the creation of trainers to the hub
    with console.status("starting"), importing():
        from loratune.training.checkpoints.resuming import Resume
        from loratune.training.failures import attempted
        from loratune.training.reporting.report import show_report
        from loratune.training.run import train
    report = train(recipe, overwrite, Resume(*resume) if resume else None)
    if report:
        attempted("the closing table", lambda: show_report(report))
    if json and report:
        DOCUMENT.write(report.values())
