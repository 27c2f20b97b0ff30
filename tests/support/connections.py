"""For tests of connections: transports that fail on demand, and waiters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import trio

from bokbok_trio import Connection, ConnectionClosed, ConnectionLost, RemoteError
from bokbok_trio.testing import FaultyStream
from tests.support.helpers import settle


def faulty(into: list[FaultyStream]) -> Callable[[trio.abc.HalfCloseableStream], trio.abc.Stream]:
    """Wraps a stream, for `open_connection_pair(wrap=...)`."""

    def wrap(stream: trio.abc.HalfCloseableStream) -> trio.abc.Stream:
        into.append(FaultyStream(stream))
        return into[-1]

    return wrap


async def start_waiting(nursery: trio.Nursery, connection: Connection, into: list[BaseException]) -> None:
    """Make a request that waits, and collect its exception."""

    async def wait() -> None:
        try:
            await connection.request(["sleep", "inf"])
        except (ConnectionClosed, ConnectionLost) as exc:
            into.append(exc)

    nursery.start_soon(wait)
    await settle()


async def ignore_loss(connection: Connection) -> None:
    with pytest.raises((ConnectionClosed, ConnectionLost)):
        await connection.request([])


async def ignore_any_loss(connection: Connection) -> None:
    with pytest.raises((ConnectionClosed, ConnectionLost, RemoteError)):
        await connection.request([])


def numbers(connection: Connection) -> tuple[int, ...]:
    """Return all fields of `ConnectionStatistics` but the two limits."""
    found = dataclasses.asdict(connection.statistics())
    return tuple(value for name, value in found.items() if name not in {"total_slots", "max_requests"})


def check_nothing_in_flight(*connections: Connection) -> None:
    for connection in connections:
        found = connection.statistics()
        assert found.used_slots == found.requests_waiting == 0
        assert found.handlers_running == found.packets_queued == 0
