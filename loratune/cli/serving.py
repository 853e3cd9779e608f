"""Flags and messages of the commands that serve HTTP."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer
from typing_extensions import TypedDict

from loratune import console
from loratune.errors import Exit, LoratuneError

if TYPE_CHECKING:
    from loratune.generation.server.addresses import Address

KEY_VARIABLE = "LORATUNE_API_KEY"
EARLIER_VARIABLE = "LORATUNE_TOKEN"
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
Json = Annotated[bool, typer.Option("--json", help="Print address and key as JSON to stdout at startup.")]


class PageValues(TypedDict):
    """A server that accepts requests; printed once, before the first."""

    url: str
    """Without a path."""
    api_key: str | None
    """The key, if it was generated; null if it was given, or none is needed."""
    process: int
    """ID of the process; SIGTERM ends it."""


def given_key(api_key: str | None, no_api_key: bool) -> str | None:
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


def require_key_or_local(address: Address, host: str, no_api_key: bool) -> None:
    """Refuse to serve without a key where other machines can connect.

    Raises:
        LoratuneError: they can.
    """
    if no_api_key and not address.is_local:
        raise LoratuneError(
            f"--no-api-key is only allowed for 127.0.0.1; --host {host} would let anyone send requests", Exit.USAGE
        )


def allowed_hosts(host: str, others: list[str] | None) -> frozenset[str]:
    """Return the host names that requests may use."""
    from loratune.generation.server.middleware import LOOPBACK_NAMES

    return LOOPBACK_NAMES | {host.lower(), *map(str.lower, others or [])}


def tell_page(address: Address, secret: str | None) -> None:
    """Print the address of the page, with the key if loratune has made it."""
    if not address.is_local:
        console.warn("other machines can connect, and the connection is not encrypted: use a TLS proxy in front")
    console.next_step(f"page: {address.url}/{f'#api_key={secret}' if secret else ''}")
