"""`loratune data preview`: shows rendered rows with their trained tokens."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from loratune import console
from loratune.cli.documents import Document
from loratune.cli.flags import Config, RowFiles, with_rows
from loratune.cli.options import recipe_options
from loratune.imports import importing
from loratune.recipe.loading import load_recipe

DETAILS = """\
Takes the recipe and flags of sft; files without a flag are those of --data.train. Shows the first training rows of each
file as the model sees them: trained text is green (between ⟦ and ⟧ without colours), control tokens are inverted, ⏎ is
a line break."""


def _printed() -> Any:
    from loratune.training.data_preview import PassesValues, SequencesValues

    return SequencesValues | PassesValues


DOCUMENT = Document("data-preview", 1, _printed)


@recipe_options
def command(
    files: RowFiles = None,
    config: Config = None,
    rows: Annotated[int, typer.Option("--rows", min=1, metavar="count", help="How many rows.")] = 3,
    ids: Annotated[bool, typer.Option("--ids", help="List every token with its id and whether it is trained.")] = False,
    packed: Annotated[bool, typer.Option("--packed", help="Show packed passes instead, as many as --rows.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print text, ids and labels as JSON instead.")] = False,
    *,
    flags: dict[str, object],
) -> None:
    recipe = load_recipe(config, dict(with_rows(flags, files)))
    with console.status("starting"), importing():
        from loratune.training.data_preview import preview_passes, preview_rows, show_pass, show_tokens
    passes = preview_passes(recipe, rows) if packed else [preview_rows(recipe, rows)]
    if json:
        shown = [[preview.as_json() for preview in one] for one in passes]
        DOCUMENT.write({"passes": shown} if packed else {"sequences": shown[0]})
        return
    for number, one in enumerate(passes, start=1):
        if packed:
            show_pass(number, one, ids)
        else:
            for preview in one:
                show_tokens(preview, ids)
