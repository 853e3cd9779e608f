"""`loratune runs serve`: a page that shows the runs of a folder as they train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loratune import console
from loratune.cli.documents import Document
from loratune.cli.serving import AllowHost, ApiKey, Host, Json, NoApiKey, PageValues, Port, served_address

DOCUMENT = Document("runs-serve", 1, lambda: PageValues)
DETAILS = """\
The page lists the runs of a folder and shows each with its curves, also while another process trains it: findings in
its rows, its health, answers before and after, evaluations, and what was made of it. Runs that are chosen are compared.
It can only read, loads nothing from other sites, and needs the key that is printed, or that of --api-key or
LORATUNE_API_KEY."""


def command(
    folder: Annotated[Path, typer.Argument(help="Folder with runs.")] = Path("out"),
    host: Host = "127.0.0.1",
    port: Port = 8001,
    api_key: ApiKey = None,
    no_api_key: NoApiKey = False,
    allow_host: AllowHost = None,
    json: Json = False,
) -> None:
    with served_address(host, port, api_key, no_api_key, allow_host) as opened:
        from loratune.board.server.application import create_application
        from loratune.generation.server.running import serve_until_signal

        app = create_application(folder, opened.access())
        opened.address.listen()
        console.say(f"runs in {folder}")
        opened.tell_page()
        if json:
            DOCUMENT.write(opened.values())
        serve_until_signal(app, opened.address, _nothing)


async def _nothing() -> None:
    """Nothing that is under way is worth waiting for."""
