"""`loratune data preview`: the text of some rows, and which of their tokens are trained."""

from __future__ import annotations

from typing import Annotated

import typer

from loratune import console
from loratune.cli.flags import Config
from loratune.cli.options import recipe_options
from loratune.recipe.loading import load_recipe

DETAILS = """\
Takes a recipe and flags as sft does. Shows the first training rows as the model will see them: what is trained is green
(between ⟦ and ⟧ where there are no colours), control tokens are inverted, ⏎ is a line's end."""


@recipe_options
def command(
    config: Config = None,
    rows: Annotated[int, typer.Option("--rows", min=1, metavar="count", help="How many rows.")] = 3,
    ids: Annotated[bool, typer.Option("--ids", help="List every token with its id and whether it is trained.")] = False,
    packed: Annotated[bool, typer.Option("--packed", help="Show packed batches instead, as many as --rows.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print text, ids and labels as JSON instead.")] = False,
    *,
    flags: dict[str, object],
) -> None:
    """Show the rows."""
    recipe = load_recipe(config, dict(flags))
    with console.status("starting"):
        from loratune.training.data_preview import preview_batches, preview_rows, show_batch, show_tokens
    batches = preview_batches(recipe, rows) if packed else [preview_rows(recipe, rows)]
    if json:
        shown = [[preview.as_json() for preview in batch] for batch in batches]
        console.write_json(shown if packed else shown[0])
        return
    for number, batch in enumerate(batches, start=1):
        if packed:
            show_batch(number, batch, ids)
        else:
            for preview in batch:
                show_tokens(preview, ids)
