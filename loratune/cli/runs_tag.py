"""`loratune runs tag`: gives a run tags, by which it is found in a list."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loratune import console
from loratune.runs.tags import change_tags

DETAILS = """\
Tags are in tags.json in the run folder. No hash covers them, so a tagged run is unchanged. They stay when a run is
resumed, and go when it is overwritten."""


def command(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    names: Annotated[list[str], typer.Argument(help="Tags.", show_default=False)],
    remove: Annotated[bool, typer.Option("--remove", help="Remove the tags.")] = False,
) -> None:
    tags = change_tags(run, remove=names) if remove else change_tags(run, add=names)
    console.say(f"{run}: {', '.join(tags) or 'no tags'}")
