"""Accept a connection: the errors of the system that a server survives, and the address of the client."""

from __future__ import annotations

import errno
import socket
from typing import Final

import trio

from ._addresses import Address, TCPAddress
from ._sockets import stream_address

ACCEPT_PAUSE: Final = 0.1
"""Seconds until the next try to accept, after the system had no descriptor or memory left; as in Trio."""

SHORTAGES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
"""Errors that mean this shortage."""

IGNORED: Final = frozenset(
    getattr(errno, name)
    for name in (
        *("ECONNABORTED", "ECONNRESET", "EPERM", "EPROTO", "ENETDOWN", "ENOPROTOOPT", "EHOSTDOWN", "ENONET"),
        *("EHOSTUNREACH", "EOPNOTSUPP", "ENETUNREACH", "ENOSR", "ESOCKTNOSUPPORT", "EPROTONOSUPPORT"),
        "ETIMEDOUT",
    )
    if hasattr(errno, name)
)
"""Errors of the connection that is accepted, and not of the listener: accept(2), "Error handling". The names
are those that `trio.SocketListener` ignores."""


async def accept_one(
    listener: trio.abc.Listener[trio.abc.Stream],
) -> tuple[trio.abc.Stream, Address | None]:
    """Accept a connection, and return its stream and the address of the client, if it has one.

    The address comes from `accept` itself where the socket was reset already and cannot tell it.
    """
    if not isinstance(listener, trio.SocketListener):
        stream = await listener.accept()
        return stream, stream_address(stream)
    while True:
        try:
            sock, name = await listener.socket.accept()
            break
        except OSError as exc:
            if exc.errno not in IGNORED:
                raise
    accepted = trio.SocketStream(sock)
    address = stream_address(accepted)
    if address is None and sock.family in {socket.AF_INET, socket.AF_INET6}:
        address = TCPAddress(str(name[0]), int(name[1]))
    return accepted, address
