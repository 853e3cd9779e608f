"""Flags that several commands share, so that they are spelled and explained once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ADAPTER_HELP = "Run folder, one of its checkpoints, or a plain PEFT folder."
Adapter = Annotated[Path | None, typer.Option("--adapter", "-a", metavar="folder", help=ADAPTER_HELP)]
Config = Annotated[
    str | None,
    typer.Option("--config", "-c", metavar="recipe", help="Recipe: a YAML file, or the name of a shipped one."),
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="folder", help="Folder of the result.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in the same folder.")]
Force = Annotated[bool, typer.Option("--force", help="Take another base than the trained one, or a changed adapter.")]
Json = Annotated[bool, typer.Option("--json", help="Print what happened as JSON to stdout.")]
Push = Annotated[
    str | None,
    typer.Option("--push", metavar="hub:org/name", help="Upload to hf:org/name or ms:org/name (ModelScope)."),
]
DryRun = Annotated[bool, typer.Option("--dry-run/--no-dry-run", help="Only tell what --push would upload.")]
Public = Annotated[bool, typer.Option("--public", help="Let everybody see the pushed repository.")]
