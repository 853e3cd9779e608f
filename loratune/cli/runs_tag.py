"""`loratune runs tag`: gives a run tags, by which it is found in a list."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typing_extensions import TypedDict

from loratune import console
from loratune.cli.documents import Document
from loratune.runs.tags import change_tags


class TagsValues(TypedDict):
    """The tags of a run."""

    run: str
    tags: list[str]


DOCUMENT = Document("runs-tag", 1, lambda: TagsValues)
DETAILS = """\
Tags are in tags.json in the run folder. No hash covers them, so a tagged run is unchanged. They stay when a run is
resumed, and go when it is overwritten."""


def command(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    names: Annotated[list[str], typer.Argument(help="Tags.", show_default=False)],
    remove: Annotated[bool, typer.Option("--remove", help="Remove the tags.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the run's tags as JSON to stdout.")] = False,
) -> None:
    tags = change_tags(run, remove=names) if remove else change_tags(run, add=names)
    console.say(f"{run}: {', '.join(tags) or 'no tags'}")
    if json:
        DOCUMENT.write(TagsValues(run=str(run), tags=list(tags)))
