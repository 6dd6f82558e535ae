"""The address of a server. This file imports nothing heavy: a wrong address is told before anything else is loaded."""

from __future__ import annotations

import socket
from typing import Any


LOOPBACK = {"127.0.0.1", "::1", "localhost"}


def is_loopback(host: str) -> bool:
    """Whether only this machine can call a server at this address."""
    return host in LOOPBACK or host.startswith("127.")


def bind(host: str, port: int) -> socket.socket:
    """
    A listening socket.

    Raises:
        OSError: if the address is taken or is none of this machine; the message has the remedy.
    """
    family, kind, protocol, _, address = _resolved(host, port)
    listening = socket.socket(family, kind, protocol)
    # The port of a server that has just ended can be taken at once.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise OSError(
            f"The server cannot listen on {host}, port {port}: {error.strerror}. Choose another with `--port`, or `--port 0` for "
            "any that is free."
        ) from error
    return listening


def _resolved(host: str, port: int) -> tuple[Any, ...]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise OSError(f"There is no address {host!r}: {error.strerror}. Check `--host`.") from error
