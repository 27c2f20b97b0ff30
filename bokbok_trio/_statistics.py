"""What goes on, in numbers, beside their limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectionStatistics:
    """What goes on on a connection, as of one moment; see `Connection.statistics`.

    Attributes:
        used_slots: requests of this side that are with the other side, or about to be sent. A
            cancelled one counts until the other side has answered it nevertheless.
        total_slots: how many those can be: requests that the other side takes at once.
        requests_waiting: requests of this side that wait for a slot, or for room at the other side.
        requests_cancelled: of `used_slots`, those that have been cancelled and are not yet answered.
        handlers_running: requests of the other side whose handlers run here, or wait for the open
            handler.
        max_requests: how many those can be: requests that this side takes at once.
        packets_queued: packets that wait to be sent; many of them, for long, mean that the other
            side does not read.
    """

    used_slots: int
    total_slots: int
    requests_waiting: int
    requests_cancelled: int
    handlers_running: int
    max_requests: int
    packets_queued: int


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class ServerStatistics:
    """What goes on in a server, as of one moment; see `Server.statistics`.

    Attributes:
        connections: connections that count against `max_connections`: those that are open, and
            those that are closed, until their handlers and close handler have ended.
        max_connections: how many those can be. The next client is refused as ``busy``.
        handshakes: unfinished handshakes. One that had to make room for another counts until it has
            ended, so this can pass `max_handshakes`, to twice that at most.
        max_handshakes: how many can go on at once. One more closes one of them; see `Settings`.
        handlers_running: requests that are being handled, over all connections.
    """

    connections: int
    max_connections: int
    handshakes: int
    max_handshakes: int
    handlers_running: int
