"""`loratune data check`: checks a recipe's rows."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from loratune import console
from loratune.cli.again import continued
from loratune.cli.documents import Document
from loratune.cli.flags import Config
from loratune.cli.options import recipe_options
from loratune.errors import Exit
from loratune.imports import importing
from loratune.recipe.loading import load_recipe

DETAILS = """\
Takes the recipe and flags of sft. Reads, encodes and checks every row without loading the model, and caches the
encoded rows for training; only changed data is encoded again."""


def _printed() -> Any:
    from loratune.training.data_report import DataReport

    return DataReport


DOCUMENT = Document("data-check", 1, _printed)


@recipe_options
def command(
    config: Config = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON to stdout.")] = False,
    *,
    flags: dict[str, object],
) -> None:
    recipe = load_recipe(config, dict(flags))
    with importing():
        from loratune.training.data_report import data_report, show_data_report
        from loratune.training.gate import pass_gate

    report = data_report(recipe, pass_gate(recipe))
    show_data_report(report)
    if json:
        DOCUMENT.write(report)
    if report["refused"]:
        raise typer.Exit(int(Exit.DATA))
    console.next_step(str(continued("train on them", "sft", {"--json"})))
