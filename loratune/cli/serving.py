"""Flags and messages of the commands that serve HTTP."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from typing_extensions import TypedDict

from loratune import console
from loratune.errors import Exit, LoratuneError
from loratune.runtime import heed_interrupts

if TYPE_CHECKING:
    from loratune.generation.server.addresses import Address
    from loratune.generation.server.middleware import Access

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


@dataclass(frozen=True)
class ServedAddress:
    """A bound address, and the key that requests to it need."""

    address: Address
    key: str | None
    is_made: bool
    """Whether loratune has made the key, which is printed then; one that the user has chosen is not."""
    hosts: frozenset[str]
    """Host names that requests may use."""

    @property
    def made_key(self) -> str | None:
        return self.key if self.is_made else None

    def access(self, origins: frozenset[str] = frozenset()) -> Access:
        """Return who may send requests; see `Access`."""
        from loratune.generation.server.middleware import Access

        return Access(self.key, self.hosts, self.address.is_any, origins)

    def values(self) -> PageValues:
        return PageValues(url=self.address.url, api_key=self.made_key, process=os.getpid())

    def tell_page(self) -> None:
        """Print the address of the page."""
        if not self.address.is_local:
            console.warn("other machines can connect, and the connection is not encrypted: use a TLS proxy in front")
        console.say(f"page: {self.address.url}/{f'#api_key={self.key}' if self.made_key else ''}", wraps=False)


@contextmanager
def served_address(
    host: str, port: int, api_key: str | None, no_api_key: bool, allow_host: list[str] | None
) -> Iterator[ServedAddress]:
    """Take an address, at which nothing listens yet.

    Args:
        host, port, api_key, no_api_key, allow_host: the flags.

    Raises:
        LoratuneError: the flags exclude each other, the address is taken, or others could connect without a key.
    """
    given = given_key(api_key, no_api_key)
    heed_interrupts()
    from loratune.generation.server.addresses import Address
    from loratune.generation.server.middleware import LOOPBACK_NAMES

    with Address(host, port) as address:
        if no_api_key and not address.is_local:
            raise LoratuneError(
                f"--no-api-key is only allowed for 127.0.0.1; --host {host} would let anyone send requests", Exit.USAGE
            )
        hosts = LOOPBACK_NAMES | {host.lower(), *map(str.lower, allow_host or [])}
        key = None if no_api_key else given or secrets.token_urlsafe(24)
        yield ServedAddress(address, key, key is not None and given is None, hosts)


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
