"""`loratune serve`: the HTTP server."""

from __future__ import annotations

import json as json_lines
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from loratune import console
from loratune.cli.documents import Document
from loratune.cli.flags import Adapters, Force, Model, MovedBase, asked_model, named_adapters
from loratune.cli.serving import (
    AllowHost,
    ApiKey,
    Host,
    Json,
    NoApiKey,
    PageValues,
    Port,
    ServedAddress,
    served_address,
)
from loratune.commands import Command
from loratune.engine.sampling import NUMBERS
from loratune.errors import Exit, LoratuneError, bullet_list, counted
from loratune.imports import importing
from loratune.plain_files import require_folder
from loratune.printable import LONGEST_PATH, shortened

DETAILS = """\
Implements the OpenAI API (/v1/chat/completions, /v1/completions, /v1/models) and a chat page. The base model and every
adapter are available by name; requests run concurrently.

--adapters serves every run and PEFT folder in a folder by its name. Each is loaded when it is first asked for; new,
changed and removed folders are noticed while the server runs, and vLLM's /v1/load_lora_adapter and
/v1/unload_lora_adapter work for them.

Requests need an API key: from --api-key or LORATUNE_API_KEY, or a generated one that is printed at startup. A signal
drains running requests and exits; a second one exits at once."""


class ServerValues(PageValues):
    """A server of the API and a page; the API is below /v1."""

    models: list[str]
    """Names of the base and the adapters."""


DOCUMENT = Document("serve", 1, lambda: ServerValues)
AllowOrigin = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-origin", metavar="url", help="Origin of another web page that may send requests. Repeatable."
    ),
]
Slots = Annotated[
    int, typer.Option("--slots", metavar="integer", min=1, max=1024, help="Maximum number of concurrent requests.")
]
MaxQueue = Annotated[
    int, typer.Option("--max-queue", metavar="integer", min=0, max=65536, help="Maximum number of queued requests.")
]
LONGEST = NUMBERS["max_new_tokens"]
MaxNewTokens = Annotated[
    int,
    typer.Option(
        "--max-new-tokens", metavar="integer", min=int(LONGEST.low), max=int(LONGEST.high), help=LONGEST.about
    ),
]

AdaptersFolder = Annotated[
    Path | None,
    typer.Option("--adapters", metavar="folder", help="Folder whose runs and PEFT folders are served by their names."),
]
InMemory = Annotated[
    int,
    typer.Option(
        "--adapters-in-memory",
        metavar="integer",
        min=1,
        max=1024,
        help="Maximum number of adapters of --adapters that are in memory.",
    ),
]


def command(
    adapter: Adapters = None,
    adapters: AdaptersFolder = None,
    adapters_in_memory: InMemory = 8,
    model: Model = None,
    base_model: MovedBase = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
    no_api_key: NoApiKey = False,
    allow_host: AllowHost = None,
    allow_origin: AllowOrigin = None,
    slots: Slots = 32,
    max_queue: MaxQueue = 64,
    max_new_tokens: MaxNewTokens = 4096,
    force: Force = False,
    json: Json = False,
) -> None:
    """Take the address, load the model, serve."""
    named = named_adapters(adapter or [])
    model = asked_model(bool(adapter or adapters), model, base_model)
    like = _first_of(adapters, model, force) if adapters and not named else None
    origins = frozenset(map(_checked_origin, allow_origin or []))
    with served_address(host, port, api_key, no_api_key, allow_host) as opened:
        with console.status(f"loading {shortened(str(model or like or named[0][1]), LONGEST_PATH)}"):
            with importing():
                from loratune.engine.engine import load_engine
                from loratune.generation.server.application import Limits
                from loratune.generation.server.running import run

            engine = load_engine(named, model, force, slots, like)
        for warning in engine.warnings:
            console.warn(warning)
        _check_names(engine)
        if adapters:
            _open_store(engine, adapters, adapters_in_memory)
        for remark in dict.fromkeys(voice.encoder.about_calls for voice in engine.voices.values()):
            if remark:
                console.warn(remark)
        opened.address.listen()
        _tell(opened, engine, like)
        if json:
            DOCUMENT.write({**opened.values(), "models": [engine.base_name, *engine.adapters]})
        run(engine, opened.address, opened.access(origins), Limits(slots, max_queue, max_new_tokens))


def _checked_origin(text: str) -> str:
    """Return an origin in the form that browsers send."""
    parts = urlsplit(text.lower())
    if parts.scheme not in ("http", "https") or not parts.netloc or text.lower() != f"{parts.scheme}://{parts.netloc}":
        raise LoratuneError(
            f"--allow-origin {text}: give scheme, host and port, as in http://localhost:3000", Exit.USAGE
        )
    return text.lower()


def _first_of(folder: Path, model: str | None, force: bool) -> Path | None:
    """Return the first adapter of a folder whose training says how the base is loaded.

    Args:
        folder: the folder of --adapters.
        model: the base, if the user has given it.
        force: see `open_adapter`.

    Raises:
        LoratuneError: no adapter names a base, and the user has given none.
    """
    from loratune.runs.adapter_folders import AdapterFolders
    from loratune.runs.opening import base_settings, open_adapter

    require_folder(folder)
    reasons = []
    for found in AdapterFolders(folder).all().values():
        try:
            base_settings(open_adapter(found.path, force), model)
        except LoratuneError as error:
            reasons.append(str(error))
        else:
            return found.path
    if model is None:
        told = f":\n{bullet_list(reasons, limit=3)}" if reasons else ""
        raise LoratuneError(f"{folder}: no adapter in it names its base; give it with --base-model{told}", Exit.USAGE)
    return None


def _open_store(engine: Any, folder: Path, most: int) -> None:
    from loratune.engine.adapter_store import AdapterStore
    from loratune.runs.adapter_folders import AdapterFolders

    folders = AdapterFolders(folder, [engine.base_name, *engine.adapters])
    engine.store = AdapterStore(engine, folders, most, console.warn)


def _check_names(engine: Any) -> None:
    if engine.base_name in engine.adapters:
        raise LoratuneError(
            f"base and adapter are both called {engine.base_name}; give the adapter a name: name=folder", Exit.USAGE
        )


def _tell(opened: ServedAddress, engine: Any, like: Path | None = None) -> None:
    """Print the page's address and an example request.

    Args:
        opened: the address.
        engine: what is served.
        like: an adapter of --adapters that can be loaded.
    """
    console.say(f"models: {', '.join([engine.base_name, *engine.adapters])}")
    names = list(engine.adapters)
    if engine.store:
        folders = engine.store.folders
        known = folders.all()
        names += [name for name, found in known.items() if found.path == like]
        console.say(f"and {counted(len(known), 'adapter')} of {folders.folder}, at most {engine.store.most} in memory")
    opened.tell_page()
    model = json_lines.dumps([*names, engine.base_name][0], ensure_ascii=False)
    messages = '[{"role": "user", "content": "Who are you?"}]'
    headers = ["Content-Type: application/json"]
    if opened.key:
        headers.append(f"Authorization: Bearer {opened.made_key or 'API_KEY'}")
    words = ["curl", f"{opened.address.url}/v1/chat/completions", *(part for line in headers for part in ("-H", line))]
    data = f'{{"model": {model},\n{" " * 9}"messages": {messages}}}'  # two lines, below each other
    console.next_step(Command("try", (*words, "-d", data)))
