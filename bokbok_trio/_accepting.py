"""Accepting a connection, and how many a process may have: what depends on the system's limits and errors."""

from __future__ import annotations

import errno
import socket
import sys
from typing import Final

import trio

from ._addresses import Address, TCPAddress
from ._settings import Settings
from ._sockets import stream_address

SPARE_DESCRIPTORS: Final = 64
"""Open files that are left to the rest of the program where connections could use all that it may have."""

HANDSHAKE_SHARE: Final = 4
"""The part of them, a quarter, that unfinished handshakes may have."""

LINGER_SHARE: Final = 16
"""The part of them, a sixteenth, that refused clients may have, which still read why."""

ACCEPT_PAUSE: Final = 0.1
"""Seconds until the next try to accept where the system has no descriptor or memory left; as Trio."""

SHORTAGES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
"""What the system says then."""

IGNORED: Final = frozenset(
    getattr(errno, name)
    for name in (
        *("ECONNABORTED", "ECONNRESET", "EPERM", "EPROTO", "ENETDOWN", "ENOPROTOOPT", "EHOSTDOWN", "ENONET"),
        *("EHOSTUNREACH", "EOPNOTSUPP", "ENETUNREACH", "ENOSR", "ESOCKTNOSUPPORT", "EPROTONOSUPPORT"),
        "ETIMEDOUT",
    )
    if hasattr(errno, name)
)
"""Errors of the connection to be accepted, and not of the listener: accept(2), "Error handling". The names
are those that `trio.SocketListener` ignores."""


def fit_descriptors(settings: Settings) -> tuple[int, int, int]:
    """How many connections, unfinished handshakes and refused clients a server has at once.

    As many as the settings say, or fewer where this process may have few open files.
    """
    wanted = settings.max_connections, settings.max_handshakes, settings.max_handshakes
    if sys.platform == "win32":
        return wanted
    import resource  # noqa: PLC0415  (Windows has none)

    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY:
        return wanted
    handshakes = max(1, min(settings.max_handshakes, files // HANDSHAKE_SHARE))
    lingering = max(1, min(settings.max_handshakes, files // LINGER_SHARE))
    connections = max(1, files - SPARE_DESCRIPTORS - handshakes - lingering)
    return min(settings.max_connections, connections), handshakes, lingering


async def accept_one(
    listener: trio.abc.Listener[trio.abc.Stream],
) -> tuple[trio.abc.Stream, Address | None]:
    """Accept a connection; and who it is with, which cannot be asked of a socket that was reset already."""
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
