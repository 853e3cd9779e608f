"""`loratune runs serve`: a page that shows the runs of a folder as they train."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated

import typer

from loratune import console
from loratune.cli.documents import Document
from loratune.cli.serving import (
    AllowHost,
    ApiKey,
    Host,
    Json,
    NoApiKey,
    PageValues,
    Port,
    allowed_hosts,
    given_key,
    require_key_or_local,
    tell_page,
)

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
    given = given_key(api_key, no_api_key)
    from loratune.board.server.application import create_application
    from loratune.generation.server.addresses import Address
    from loratune.generation.server.middleware import Access
    from loratune.generation.server.running import serve_until_signal

    with Address(host, port) as address:
        require_key_or_local(address, host, no_api_key)
        secret = None if no_api_key else given or secrets.token_urlsafe(24)
        access = Access(secret, allowed_hosts(host, allow_host), address.is_any)
        app = create_application(folder, access)
        address.listen()
        console.say(f"runs in {folder}")
        made_key = secret if secret != given else None
        tell_page(address, made_key)
        if json:
            DOCUMENT.write(PageValues(url=address.url, api_key=made_key, process=os.getpid()))
        serve_until_signal(app, address, _nothing)


async def _nothing() -> None:
    """Nothing that is under way is worth waiting for."""
