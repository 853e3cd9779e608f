"""`loratune data check`: checks a recipe's rows."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from loratune import console
from loratune.cli.documents import Document
from loratune.cli.flags import Config, RowFiles, with_rows
from loratune.cli.options import recipe_options
from loratune.commands import loratune, setting_flags
from loratune.errors import Exit, LoratuneError
from loratune.imports import importing
from loratune.recipe.loading import load_recipe

DETAILS = """\
Takes the recipe and flags of sft; files without a flag are those of --data.train. Reads, encodes and checks every row
without loading the model, and caches the encoded rows for training; only changed data is encoded again."""


def _printed() -> Any:
    from loratune.training.data_report import DataReport

    return DataReport


DOCUMENT = Document("data-check", 1, _printed)


@recipe_options
def command(
    files: RowFiles = None,
    config: Config = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON to stdout.")] = False,
    *,
    flags: dict[str, object],
) -> None:
    settings = with_rows(flags, files)
    recipe = load_recipe(config, dict(settings))
    with importing():
        from loratune.training.data_report import data_report, show_data_report
        from loratune.training.gate import pass_gate

    try:
        data = pass_gate(recipe)
    except LoratuneError as error:
        if error.exit_code == Exit.MODEL:
            console.say("the rows can be read, and have questions and answers; all else is checked with the tokenizer")
        raise
    report = data_report(recipe, data)
    show_data_report(report)
    if json:
        DOCUMENT.write(report)
    if report["refused"]:
        raise typer.Exit(int(Exit.DATA))
    console.next_step(loratune("train on them", "sft", {"--config": config, **setting_flags(settings)}))
