"""`loratune serve`: the HTTP server."""

from __future__ import annotations

import json
import os
import secrets
import shlex
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from loratune import console
from loratune.cli.flags import Adapters, Force, Model, MovedBase, asked_model, named_adapters
from loratune.engine.sampling import NUMBERS
from loratune.errors import Exit, LoratuneError
from loratune.printable import LONGEST_PATH, shortened

KEY_VARIABLE = "LORATUNE_API_KEY"
EARLIER_VARIABLE = "LORATUNE_TOKEN"
DETAILS = """\
Implements the OpenAI API (/v1/chat/completions, /v1/completions, /v1/models) and a chat page. The base model and every
adapter are available by name; requests run concurrently.

Requests need an API key: from --api-key or LORATUNE_API_KEY, or a generated one that is printed at startup. A signal
drains running requests and exits; a second one exits at once."""

Host = Annotated[str, typer.Option("--host", metavar="address", help="Address to listen on.")]
Port = Annotated[int, typer.Option("--port", metavar="integer", min=0, max=65535, help="Port; 0 picks a free one.")]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", metavar="text", help="API key that requests must send; visible to other users in ps."),
]
NoApiKey = Annotated[
    bool, typer.Option("--no-api-key", help="Accept requests without a key, from any user of this machine.")
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option("--allow-host", metavar="name", help="Additional host name of this server. Repeatable."),
]
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


def command(
    adapter: Adapters = None,
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
) -> None:
    """Take the address, load the model, serve."""
    model = asked_model(bool(adapter), model, base_model)
    adapters = named_adapters(adapter or [])
    given, origins = _given_key(api_key, no_api_key), frozenset(map(_checked_origin, allow_origin or []))
    from loratune.generation.server.addresses import Address

    with Address(host, port) as address:
        if no_api_key and not address.is_local:
            raise LoratuneError(
                f"--no-api-key is only allowed for 127.0.0.1; --host {host} would let anyone send requests", Exit.USAGE
            )
        with console.status(f"loading {shortened(str(model or adapters[0][1]), LONGEST_PATH)}"):
            from loratune.engine.engine import load_engine
            from loratune.generation.server.application import Limits
            from loratune.generation.server.middleware import LOOPBACK_NAMES, Access
            from loratune.generation.server.running import run

            engine = load_engine(adapters, model, force, slots)
        for warning in engine.warnings:
            console.warn(warning)
        _check_names(engine)
        for remark in dict.fromkeys(voice.encoder.about_calls for voice in engine.voices.values()):
            if remark:
                console.warn(remark)
        secret = None if no_api_key else given or secrets.token_urlsafe(24)
        hosts = LOOPBACK_NAMES | {host.lower(), *map(str.lower, allow_host or [])}
        address.listen()
        _tell(address, engine, secret, is_made=secret != given)
        run(
            engine,
            address,
            Access(secret, hosts, address.is_any, origins),
            Limits(slots, max_queue, max_new_tokens),
        )


def _given_key(api_key: str | None, no_api_key: bool) -> str | None:
    """Return the API key that the user has chosen; None if there is none."""
    if no_api_key and api_key is not None:
        raise LoratuneError("--api-key and --no-api-key exclude each other", Exit.USAGE)
    chosen = api_key if api_key is not None else _key_of_environment()
    if chosen is not None and (not chosen or not all("!" <= letter <= "~" for letter in chosen)):
        raise LoratuneError(f"--api-key and {KEY_VARIABLE} take ASCII characters without blanks", Exit.USAGE)
    return chosen


def _key_of_environment() -> str | None:
    earlier = os.environ.get(EARLIER_VARIABLE)
    if earlier and not os.environ.get(KEY_VARIABLE):
        console.say(f"{EARLIER_VARIABLE} is now {KEY_VARIABLE} (the old name still works)")
        return earlier
    return os.environ.get(KEY_VARIABLE) or None


def _checked_origin(text: str) -> str:
    """Return an origin in the form that browsers send."""
    parts = urlsplit(text.lower())
    if parts.scheme not in ("http", "https") or not parts.netloc or text.lower() != f"{parts.scheme}://{parts.netloc}":
        raise LoratuneError(
            f"--allow-origin {text}: give scheme, host and port, as in http://localhost:3000", Exit.USAGE
        )
    return text.lower()


def _check_names(engine: Any) -> None:
    if engine.base_name in engine.adapters:
        raise LoratuneError(
            f"base and adapter are both called {engine.base_name}; give the adapter a name: name=folder", Exit.USAGE
        )


def _tell(address: Any, engine: Any, secret: str | None, is_made: bool) -> None:
    """Print the page's address and an example request. A key that the user has chosen is not printed."""
    if not address.is_local:
        console.warn("other machines can connect, and the connection is not encrypted: use a TLS proxy in front")
    console.say(f"models: {', '.join([engine.base_name, *engine.adapters])}")
    console.next_step(f"page: {address.url}/{f'#api_key={secret}' if secret and is_made else ''}")
    name = (engine.adapters or [engine.base_name])[0]
    asked = {"model": name, "messages": [{"role": "user", "content": "Who are you?"}]}
    headers = ["Content-Type: application/json"]
    if secret:
        headers.append(f"Authorization: Bearer {secret if is_made else 'API_KEY'}")
    command = ["curl", f"{address.url}/v1/chat/completions", *(part for line in headers for part in ("-H", line))]
    console.next_step(f"try: {shlex.join([*command, '-d', json.dumps(asked, ensure_ascii=False)])}")
