"""Reconnecting connections: a peer that takes no more requests, and channels."""

from __future__ import annotations

import math
from contextlib import suppress

import pytest
import trio
import trio.testing

from bokbok_trio import ConnectionClosed, ConnectionLost, Settings, open_reconnecting
from bokbok_trio._dialler import MAX_CONNECTIONS
from bokbok_trio.testing import MemoryListener

from ..support.helpers import RawPeer, settle
from ..support.network import A, B, Network, count_items, drop


async def test_while_the_old_connection_drains_the_next_is_used_already(
    network: Network, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[list[bytes]] = []
    slots = Settings(max_requests=3)
    async with network.server(address=A, settings=slots) as a, network.server(address=B):
        async with open_reconnecting([A, B]) as client:

            async def ask(*fields: str) -> None:
                answers.append(await client.request(fields))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, "sleep", "5")
                nursery.start_soon(ask, "sleep", "3")
                await trio.sleep(1)
                first = client.connection
                assert first is not None
                a.stop(grace=60)
                assert await client.request(["ping", "x"]) == [b"pong", b"x"]
                assert client.connection is not first
                assert not first.closed
                assert trio.current_time() == 1
                second = client.connection
            assert answers == [[b"slept"]] * 2
            assert client.connection is second
            assert network.where == [A, B]
            assert trio.current_time() == 5
            await settle()
            assert first.closed
            assert a.connections == frozenset()
    assert "done with the connection with 127.0.0.1:1: it is draining" in caplog.text


async def test_a_connection_that_this_side_drains_is_asked_no_more(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    """If it were, it might never be done."""
    answers: list[list[bytes]] = []
    async with network.server(), open_reconnecting(A) as client:

        async def ask_for_long() -> None:
            answers.append(await client.request(["sleep", "50"]))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_for_long)
            assert await client.request(["ping", "x"]) == [b"pong", b"x"]
            await trio.sleep(10)
            first = client.connection
            assert first is not None
            first.drain()
            assert await client.request(["ping", "x"]) == [b"pong", b"x"]
            assert client.connection not in {first, None}
            assert network.times == [0, 10]
            await first.wait_closed()
            assert trio.current_time() == 50
        assert answers == [[b"slept"]]
        second = client.connection
        assert second is not None
        second.drain()
        await second.wait_closed()
        await settle()
        assert client.connection not in {second, None}, "nobody has to ask for it"


async def test_who_hears_late_that_a_connection_drains_does_not_end_the_next(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    listener = network.listen(A)

    async def serve_slowly() -> None:
        peer = RawPeer(await listener.accept())
        await peer.shake_hands()
        for _ in range(2):
            [_, id, *_] = await peer.receive()
            await trio.sleep(1)
            await peer.send(b"err", id, b"closing", b"not now", b"")

    async with trio.open_nursery() as nursery, network.server(address=B) as b:
        nursery.start_soon(serve_slowly)
        async with open_reconnecting([A, B]) as client:
            async with trio.open_nursery() as askers:
                askers.start_soon(client.request, ["ping", "1"])
                askers.start_soon(client.request, ["ping", "2"])
                await trio.sleep(1.5)
                [connection] = b.connections
            assert trio.current_time() == 2
            assert [connection] == list(b.connections)
            assert network.where == [A, B]


async def closing_peer(listener: MemoryListener) -> None:
    """A peer that answers every request as not run, and never closes."""

    async def serve(stream: trio.abc.Stream) -> None:
        peer = RawPeer(stream)
        await peer.shake_hands()
        with suppress(AssertionError):  # until it is cut
            while True:
                [_, id, *_] = await peer.receive()
                await peer.send(b"err", id, b"closing", b"not now", b"")

    async with trio.open_nursery() as nursery:
        while True:
            nursery.start_soon(serve, await listener.accept())


async def test_a_channel_goes_over_the_connection_that_there_is_or_the_next(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with network.server(channel_handler=count_items) as server, open_reconnecting(A) as client:
        first = client.connection
        for _ in range(2):  # the second has to wait
            async with client.open_channel(["count"]) as channel:
                await channel.send(["item"])
                await channel.end()
                assert await channel.answer() == [b"1"]
            for connection in server.connections:
                connection.drain()
            await settle()
        async with client.open_channel(["count"]) as channel:
            assert client.connection is not first
            await drop(server)
            with pytest.raises(ConnectionLost):
                await channel.receive()
    with pytest.raises(ConnectionClosed):
        async with client.open_channel(["count"]):
            raise AssertionError


async def test_a_channel_is_opened_on_no_connection_that_this_side_drains(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with network.server(channel_handler=count_items), open_reconnecting(A) as client:
        first = client.connection
        assert first is not None
        first.drain()
        async with client.open_channel(["count"]) as channel:
            assert client.connection not in {first, None}
            await channel.end()
            assert await channel.answer() == [b"0"]


async def test_a_channels_first_fields_are_checked_before_it_waits(network: Network) -> None:
    async with network.server(), open_reconnecting(A) as client:
        with pytest.raises(TypeError):
            async with client.open_channel("count"):  # type: ignore[arg-type]
                raise AssertionError


async def test_a_client_may_handle_the_channels_of_the_other_side(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with network.server() as server, open_reconnecting(A, channel_handler=count_items):
        (connection,) = server.connections
        async with connection.open_channel(["count"]) as channel:
            await channel.end()
            assert await channel.answer() == [b"0"]


async def test_connections_that_do_not_end_are_bounded(
    network: Network, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(closing_peer, network.listen())
        async with open_reconnecting(A, settings=Settings(ping_after=math.inf)) as client:
            with trio.move_on_after(10_000):
                await client.request(["x"])
            assert len(network.dialled) == MAX_CONNECTIONS
            assert network.times[:4] == [0, 0.2, 0.6, 1.4]
            assert caplog.text.count("16 connections have not ended; waiting") == 1
            await network.cut(3)
            await trio.sleep(60)
            assert len(network.dialled) == MAX_CONNECTIONS + 1
        nursery.cancel_scope.cancel()
