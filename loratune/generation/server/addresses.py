"""The address that the server listens on."""

from __future__ import annotations

import ipaddress
import socket

from loratune.errors import Exit, LoratuneError


class Address:
    """A bound host and port; clients cannot connect before `listen`.

    Args:
        host: name or IP address.
        port: port; 0 picks a free one.

    Raises:
        LoratuneError: the address is unknown, in use, or not permitted.
    """

    def __init__(self, host: str, port: int) -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except (OSError, UnicodeError) as error:
            raise LoratuneError(f"--host {host}: no such address", Exit.USAGE) from error
        family, kind, protocol, _, place = found[0]
        self.socket = socket.socket(family, kind, protocol)
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind(place)
        except OSError as error:
            self.socket.close()
            raise LoratuneError(
                f"{host}, port {port}: {error.strerror}; take another with --port or --host", Exit.IO
            ) from error
        self.ip = ipaddress.ip_address(self.socket.getsockname()[0].partition("%")[0])
        self.host = host

    def __enter__(self) -> Address:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def listen(self) -> None:
        """Accept connections; they wait until the server runs."""
        self.socket.listen()

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return self.ip.is_loopback

    @property
    def is_any(self) -> bool:
        """Whether it covers all addresses of the machine."""
        return self.ip.is_unspecified

    @property
    def url(self) -> str:
        """The URL for a browser on this machine."""
        name = "127.0.0.1" if self.is_any else self.host
        return f"http://{f'[{name}]' if ':' in name else name}:{self.socket.getsockname()[1]}"
