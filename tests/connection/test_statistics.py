"""The statistics of a connection, and the objects that remain when it has ended."""

from __future__ import annotations

import gc
import weakref

import pytest
import trio
import trio.testing

import bokbok_trio
from bokbok_trio import Connection, ConnectionStatistics, RemoteError, Settings, open_connection, open_server
from bokbok_trio._connection.waiting import Waiter
from bokbok_trio.testing import FaultyStream, MemoryListener, open_connection_pair
from tests.support.connections import faulty, numbers, start_waiting
from tests.support.helpers import busy_handler, echo, settle

# ---- what it is ----


async def test_what_a_connection_tells_of_itself() -> None:
    async with open_connection_pair() as (client, server):
        assert (client.side, server.side) == ("client", "server")
        assert client.user == server.user == "user"
        assert client.encrypted
        assert server.encrypted
        assert client.address is server.address is None
        assert client.peer_credentials is server.peer_credentials is None
        assert client.server is None
        assert isinstance(server.server, bokbok_trio.Server)
        assert isinstance(client, Connection)
        assert client.data is server.data is None
        client.data = {"mine": 1}
        assert repr(client) == "<bokbok_trio.Connection client None user='user' open>"
    assert repr(client) == "<bokbok_trio.Connection client None user='user' closed>"
    async with open_connection_pair(sealed=False) as (client, server):
        assert client.user is server.user is None
        assert not client.encrypted
        assert not server.encrypted


async def test_the_statistics_of_a_connection(autojump_clock: trio.testing.MockClock) -> None:
    may_end = trio.Event()

    async def stubborn(connection: Connection, request: list[bytes]) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 100):
            await may_end.wait()

    streams: list[FaultyStream] = []
    async with open_connection_pair(
        server_handler=stubborn,
        client_settings=Settings(max_requests=7),
        server_settings=Settings(max_requests=3),
        sealed=False,
        wrap=faulty(streams),
    ) as (client, server):
        assert client.statistics() == ConnectionStatistics(
            used_slots=0,
            total_slots=3,
            requests_waiting=0,
            requests_cancelled=0,
            handlers_running=0,
            max_requests=7,
            packets_queued=0,
        )
        assert (server.statistics().total_slots, server.statistics().max_requests) == (7, 3)
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as cancelled:
                    cancelled.start_soon(client.request, [])
                    await settle()
                    for _ in range(4):
                        nursery.start_soon(client.request, [])
                    await settle()
                    #                         used, waiting, cancelled, handlers, packets
                    assert numbers(client) == (3, 2, 0, 0, 0)
                    assert numbers(server) == (0, 0, 0, 3, 0)
                    scope.cancel()
            await settle()
            assert numbers(client) == (3, 2, 1, 0, 0)
            assert numbers(server) == (0, 0, 0, 3, 0), "it does not heed its cancellation"
            may_end.set()
            await settle()
        assert numbers(client) == numbers(server) == (0, 0, 0, 0, 0)
        streams[0].sending.stall()
        async with trio.open_nursery() as nursery:
            for _ in range(3):  # a send of its own, which waits, and what comes after it
                nursery.start_soon(client.request, [])
                await settle()
            assert numbers(client) == (3, 0, 0, 0, 2)
            streams[0].sending.resume()
    assert numbers(client) == numbers(server) == (0, 0, 0, 0, 0)


async def test_a_closed_connection_counts_its_handlers_and_no_requests_of_its_own() -> None:
    may_end = trio.Event()
    asked: list[BaseException] = []

    async def stubborn(connection: Connection, request: list[bytes]) -> None:
        with trio.CancelScope(shield=True):
            await may_end.wait()

    async with trio.open_nursery() as nursery:
        async with open_connection_pair(stubborn, stubborn) as (client, server):
            for connection in (client, server):
                await start_waiting(nursery, connection, asked)
            await settle()
            assert numbers(client) == numbers(server) == (1, 0, 0, 1, 0)
            await client.aclose()
            await settle()
            assert numbers(client) == numbers(server) == (0, 0, 0, 1, 0)
            may_end.set()
            await settle()
            assert numbers(client) == numbers(server) == (0, 0, 0, 0, 0)
    assert len(asked) == 2


async def test_a_closed_connection_leaves_no_reference_cycle_to_a_waiter() -> None:
    async with open_connection_pair(server_handler=echo) as (client, _):
        gc.collect()
        gc.disable()
        try:
            for _ in range(10):
                await client.request(["x"])
            assert not [thing for thing in gc.get_objects() if isinstance(thing, Waiter)]
        finally:
            gc.enable()


async def test_a_request_error_is_the_same_for_every_waiter_but_not_the_same_object() -> None:
    caught: list[BaseException] = []
    async with open_connection_pair(server_handler=busy_handler) as (client, _):
        async with trio.open_nursery() as nursery:
            await start_waiting(nursery, client, caught)
            await start_waiting(nursery, client, caught)
            await client.aclose()
    assert str(caught[0]) == str(caught[1])
    assert caught[0] is not caught[1]


# ---- sending at once ----


async def test_a_connection_that_has_ended_is_no_cyclic_garbage() -> None:
    ended: list[weakref.ref[Connection]] = []

    async def note(connection: Connection) -> None:
        ended.append(weakref.ref(connection))
        await trio.lowlevel.checkpoint()

    async def use(listener: MemoryListener) -> None:
        async with open_connection(listener.connect(), close_handler=note) as connection:
            assert await connection.request(["x"]) == [b"x"]
            with pytest.raises(RemoteError):
                async with connection.open_channel([]) as channel:
                    await channel.answer()
        assert connection.statistics().handlers_running == 0

    listener = MemoryListener()
    gc.collect()
    gc.disable()
    try:
        async with open_server([listener], echo, close_handler=note):
            await use(listener)
            await settle()
            assert [reference() for reference in ended] == [None, None]
    finally:
        gc.enable()
