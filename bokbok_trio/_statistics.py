"""Present numbers of requests, connections and handshakes, beside their limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectionStatistics:
    """The present numbers of a connection; see `Connection.statistics`.

    Attributes:
        used_slots: requests of this side that the other side has, or that are about to be sent. A cancelled
            one counts until the other side has answered it.
        total_slots: limit of `used_slots`: requests that the other side takes at once.
        requests_waiting: requests of this side that wait for a slot, or for room at the other side.
        requests_cancelled: those of `used_slots` that were cancelled and are not answered yet.
        handlers_running: requests of the other side whose handlers run here, or wait for the open handler.
        max_requests: limit of `handlers_running`: requests that this side takes at once.
        packets_queued: packets that wait to be sent. If there are many for long, the other side does not
            read.
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
    """The present numbers of a server; see `Server.statistics`.

    Attributes:
        connections: connections that are open, or whose handlers and close handler have not ended.
        max_connections: limit of `connections`. The next client is refused as ``busy``.
        handshakes: unfinished handshakes. One that was displaced by another counts until it has ended, so
            this can exceed `max_handshakes`, up to twice that.
        max_handshakes: handshakes that may go on at once. One more closes one of them; see `Settings`.
        handlers_running: requests that handlers work on, of all connections.
    """

    connections: int
    max_connections: int
    handshakes: int
    max_handshakes: int
    handlers_running: int
