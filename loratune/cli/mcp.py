"""`loratune mcp`: tools for agents over the Model Context Protocol."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from loratune.cli.documents import Document
from loratune.cli.failures import document_of
from loratune.errors import Exit, LoratuneError

DETAILS = """\
Speaks the protocol on standard input and output, as clients start it. The tools check, plan, sft, status, infer,
eval and merge run the commands of these names (check is data check, status is runs show), and answer with their JSON
documents.

sft trains in the background, and goes on if the server ends. Tools read and write below --root alone, also through
links, read from --read too, use no network, and replace nothing."""


def _started() -> Any:
    from loratune.mcp_server.training import StartedTraining

    return StartedTraining


STARTED = Document("mcp-sft", 1, _started)
"""The answer of the tool sft; the other tools answer with the documents of their commands."""
Root = Annotated[Path, typer.Option("--root", metavar="folder", help="Folder of the project: all paths are below it.")]
Read = Annotated[
    list[Path] | None,
    typer.Option("--read", metavar="folder", help="Further folder to read from, such as one of models. Repeatable."),
]


def command(root: Root = Path(), read: Read = None) -> None:
    for folder in (root, *(read or [])):
        if not folder.is_dir():
            raise LoratuneError(f"{folder}: no such folder; give one that exists", Exit.USAGE)
    from huggingface_hub.constants import HF_HUB_CACHE

    from loratune.mcp_server.bounds import Bounds
    from loratune.mcp_server.server import serve
    from loratune.recipe.loading import ASSETS

    readable = [*(read or []), Path(HF_HUB_CACHE), ASSETS]
    place = Path(os.path.realpath(root))
    bounds = Bounds(place, tuple(Path(os.path.realpath(folder)) for folder in readable))
    serve(bounds, document_of, STARTED.of)
