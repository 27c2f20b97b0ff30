"""For tests of channels: both ends of a channel, and handlers."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import trio

from bokbok_trio import Channel, Connection, Settings
from bokbok_trio._protocol.flow_control import WINDOW
from bokbok_trio.testing import open_connection_pair
from tests.support.connections import check_nothing_in_flight
from tests.support.helpers import RawPeer, settle
from tests.support.inside import session_of, tables_of, tables_of_an_engine


async def echo_items(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
    async for item in channel:
        await channel.send(item)
    return request


class Handler:
    """A channel handler that gives its channel to the test, and ends when the test tells it to."""

    def __init__(self) -> None:
        self.channel: Channel
        self.started = trio.Event()
        self.may_end = trio.Event()
        self.ended_by: BaseException | None = None
        self.error: Exception | None = None

    async def __call__(self, connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
        self.channel = channel
        self.started.set()
        try:
            await self.may_end.wait()
        except BaseException as exc:
            self.ended_by = exc
            raise
        if self.error is not None:
            raise self.error
        return [b"re: ", *request]


@asynccontextmanager
async def open_pair(
    max_requests: int = 100,
) -> AsyncGenerator[tuple[Connection, Connection, Channel, Handler]]:
    """A client, a server, and both ends of a channel: the client's, and its handler."""
    handler = Handler()
    settings = Settings(max_requests=max_requests)
    async with open_connection_pair(server_channel_handler=handler, server_settings=settings) as (
        client,
        server,
    ):
        async with client.open_channel(["hello"]) as channel:
            await handler.started.wait()
            yield client, server, channel, handler
        await settle()
        assert_nothing_is_left(client, server)


def assert_nothing_is_left(*connections: Connection) -> None:
    for connection in connections:
        check_nothing_in_flight(connection)
        assert not any(tables_of(connection)), tables_of(connection)
        if not connection.closed:
            assert not any(tables_of_an_engine(session_of(connection)))
            assert not len(session_of(connection).flow_control)


async def fill(channel: Channel) -> int:
    """Send items until the next one would wait. Return the bytes of their bodies."""
    size = 0
    with trio.move_on_after(1) as scope:
        while True:
            await channel.send([bytes(1000 - 5)])
            size += 1000
    assert scope.cancelled_caught
    return size


async def receive_chan(peer: RawPeer) -> None:
    chan = await peer.receive()
    assert chan[:2] == [b"chan", b"0"]
    assert chan[3:] == [b"", b"", b"%d" % WINDOW, b"\0"]
