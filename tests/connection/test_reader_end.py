"""The end of a connection, in the middle of packets that were received together."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from bokbok_trio import (
    Connection,
    ConnectionClosed,
    ConnectionLost,
    Server,
    Settings,
    open_connection,
    open_server,
)
from bokbok_trio._connection.ending import CLOSE_TIMEOUT
from bokbok_trio.testing import FaultyStream, MemoryListener, open_connection_pair
from tests.support.handlers import in_memory_and_over_sockets, never_waits, wait_and_do
from tests.support.helpers import RawPeer, close_in_one_step, open_peer, outcomes, packet, req, settle
from tests.support.inside import close_at_once
from tests.support.streams import Deaf


async def test_what_is_left_of_a_batch_when_the_connection_is_closed_is_not_handled(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    started: list[bytes] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        started.extend(request)
        await wait_and_do(lambda: close_at_once(connection, "in between"))
        await trio.sleep(100)

    async with open_peer(handler) as (connection, peer), trio.open_nursery() as nursery:

        async def ask() -> None:
            with pytest.raises(ConnectionClosed, match="in between"):
                await connection.request([])

        nursery.start_soon(ask)
        assert (await peer.receive())[0] == b"req"
        await peer.stream.send_all(req(1, b"1") + req(3, b"3") + packet(b"ok", b"0", body=[]) + req(5, b"5"))
        await settle()
        assert started == [b"1"]
    assert trio.current_time() == 0  # so nobody was waited for
    assert caplog.records == []  # and no answer was taken for one that is not awaited


async def test_what_arrives_when_the_connection_is_over_is_not_handled(
    autojump_clock: trio.testing.MockClock,
) -> None:
    handled: list[list[bytes]] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        handled.append(request)

    async with open_peer(handler) as (connection, peer):
        await peer.stream.send_all(req(1))
        # The task that reads is woken by these bytes, and before it runs the connection is closed.
        await close_in_one_step(connection)
        await connection.wait_closed()
    assert handled == []


async def test_a_connection_that_is_closed_before_it_reads_ends_and_handles_nothing(
    autojump_clock: trio.testing.MockClock,
) -> None:
    handled: list[list[bytes]] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        handled.append(request)

    ours, theirs = trio.testing.memory_stream_pair()
    peer = RawPeer(theirs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.shake_hands)
        async with open_connection(ours, request_handler=handler) as connection:
            await close_in_one_step(connection)
        await connection.wait_closed()
        assert await theirs.receive_some() == b""
    assert handled == []


async def test_a_goodbye_waits_a_second_for_a_peer_that_does_not_read(
    autojump_clock: trio.testing.MockClock,
) -> None:
    streams: list[FaultyStream] = []

    def wrap(stream: trio.abc.HalfCloseableStream) -> trio.abc.Stream:
        streams.append(FaultyStream(stream))
        return streams[0]

    async with open_connection_pair(never_waits, wrap=wrap) as (client, _):
        await settle()
        streams[0].sending.stall()
        await close_in_one_step(client)
        await settle()
        assert trio.current_time() == 0
        await client.wait_closed()
        assert trio.current_time() == CLOSE_TIMEOUT


@pytest.mark.parametrize("close", [Connection.aclose, close_in_one_step])
@pytest.mark.parametrize("waits", [False, True])
@in_memory_and_over_sockets
async def test_a_handler_closes_the_connection_and_the_rest_of_the_batch_is_not_handled(
    close: Callable[[Connection], Awaitable[None]],
    waits: bool,
    over_sockets: bool,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    handled: list[bytes] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        handled.extend(request)
        if request == [b"close"]:
            if waits:
                await trio.sleep(1)
            await close(connection)
        elif request == [b"sleep"]:
            await trio.sleep(100)

    async with open_peer(handler, over_sockets=over_sockets) as (connection, peer):
        await peer.stream.send_all(req(1, b"now") + req(3, b"close") + req(5, b"sleep"))
        assert await outcomes(peer, 1) == {1: b"ok"}  # it was there before, and leaves
        assert await peer.stream.receive_some() == b""
        await peer.stream.aclose()
        assert handled == [b"now", b"close"] + ([b"sleep"] if waits else [])
        await connection.wait_closed()
        assert trio.current_time() == waits
    assert caplog.records == []


@in_memory_and_over_sockets
async def test_a_handler_drains_the_connection_and_the_rest_of_the_batch_is_answered_unrun(
    over_sockets: bool, autojump_clock: trio.testing.MockClock
) -> None:
    handled: list[bytes] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        handled.extend(request)
        if request == [b"drain"]:
            connection.drain()
            await trio.sleep(1)

    settings = Settings(max_requests=5)
    async with open_peer(handler, settings, over_sockets=over_sockets) as (connection, peer):
        await peer.stream.send_all(req(1, b"now") + req(3, b"drain") + req(5, b"late"))
        assert await peer.receive() == [b"bye"]
        assert await outcomes(peer, 2) == {1: b"ok", 5: b"closing"}
        await peer.stream.send_all(packet(b"bye-ok"))
        assert await outcomes(peer, 1) == {3: b"ok"}
        assert await peer.stream.receive_some() == b""
        await peer.stream.aclose()
        await connection.wait_closed()
    assert handled == [b"now", b"drain"]
    assert trio.current_time() == 1


@pytest.mark.parametrize("first", [b"now", b"later"])
@in_memory_and_over_sockets
async def test_a_connection_that_drains_closes_when_the_last_of_a_batch_has_ended(
    first: bytes, over_sockets: bool, autojump_clock: trio.testing.MockClock
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        connection.drain()
        if request == [b"later"]:
            await trio.lowlevel.checkpoint()

    async with open_peer(handler, over_sockets=over_sockets) as (connection, peer):
        await peer.stream.send_all(req(1, first))
        assert sorted([(await peer.receive())[0], (await peer.receive())[0]]) == [b"bye", b"ok"]
        await peer.stream.send_all(packet(b"bye-ok"))
        assert await peer.stream.receive_some() == b""
        await peer.stream.aclose()
        await connection.wait_closed()
    assert trio.current_time() == 0


@pytest.mark.parametrize("waits", [False, True])
async def test_a_handler_stops_its_server(waits: bool, autojump_clock: trio.testing.MockClock) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        server = connection.server
        assert isinstance(server, Server)
        if waits:
            await trio.sleep(1)
        server.stop(grace=0)
        return request

    listener = MemoryListener()
    async with open_server([listener], handler) as server:
        async with open_connection(listener.connect()) as client:
            try:
                assert await client.request(["last"]) == [b"last"]
            except ConnectionLost:
                assert waits  # its grace was over before the answer could leave
            await server.wait_stopped()
            assert trio.current_time() == waits


async def test_the_peer_is_gone_in_the_middle_of_a_packet_after_requests(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ended: list[bytes] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        try:
            if request == [b"wait"]:
                await trio.sleep_forever()
        finally:
            ended.extend(request)

    async with open_peer(handler) as (connection, peer):
        await peer.stream.send_all(req(1, b"now") + req(3, b"wait") + req(5, b"wait") + req(7)[:9])
        await peer.stream.aclose()
        await connection.wait_closed()
        with pytest.raises(ConnectionLost, match="cut a packet short"):
            await connection.request([])
    assert ended == [b"now", b"wait", b"wait"]
    assert caplog.records == []


@pytest.mark.parametrize("first", [b"now", b"wait"])
@in_memory_and_over_sockets
async def test_what_came_before_a_packet_that_is_none_is_handled_and_then_it_ends(
    first: bytes, over_sockets: bool, caplog: pytest.LogCaptureFixture
) -> None:
    handled: list[bytes] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        handled.extend(request)
        if request == [b"wait"]:
            await trio.sleep_forever()

    async with open_peer(handler, over_sockets=over_sockets) as (connection, peer):
        await peer.stream.send_all(req(1, first) + req(3, b"now") + packet(b"nonsense") + req(5, b"never"))
        while (await peer.receive())[0] != b"abort":
            pass
        await peer.stream.aclose()
        await connection.wait_closed()
        with pytest.raises(ConnectionLost, match="the peer broke the protocol: unknown packet"):
            await connection.request([])
    assert handled == [first, b"now"]
    assert [record.message.count("broke the protocol") for record in caplog.records] == [1]


async def test_what_the_stream_raises_ends_the_connection() -> None:
    streams: list[FaultyStream] = []

    def wrap(stream: trio.abc.HalfCloseableStream) -> trio.abc.Stream:
        streams.append(FaultyStream(stream))
        return streams[0]

    async with open_connection_pair(never_waits, never_waits, sealed=False, wrap=wrap) as (client, server):
        assert await client.request(["x"]) == [b"x"]
        await streams[0].cut()
        with pytest.raises(ConnectionLost):
            await server.request([])
        with pytest.raises(ConnectionLost, match="receiving failed: this stream was cut"):
            await client.request([])


@pytest.mark.parametrize(
    "meanwhile", [[], [b"now"], [b"brief"], [b"long"], [b"now", b"long", b"brief", b"now"]]
)
async def test_when_sending_is_broken_requests_are_handled_for_a_moment_whichever_task_reads(
    meanwhile: list[bytes], autojump_clock: trio.testing.MockClock
) -> None:
    ended: list[tuple[bytes, float]] = []
    lasts = {b"now": 0.0, b"brief": CLOSE_TIMEOUT / 4, b"long": math.inf}

    async def handler(connection: Connection, request: list[bytes]) -> None:
        try:
            if request != [b"now"]:
                await trio.sleep(lasts[request[0]])
        finally:
            ended.append((request[0], trio.current_time()))

    deaf: list[Deaf] = []

    def wrap(stream: trio.abc.HalfCloseableStream) -> trio.abc.Stream:
        deaf.append(Deaf(stream))
        return deaf[0]

    async def ask(connection: Connection, name: bytes) -> None:
        with pytest.raises(ConnectionLost):
            await connection.request([name])

    async with open_connection_pair(handler, sealed=False, wrap=wrap) as (client, server):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, server, b"long")
            await settle()
            deaf[0].broken = True
            nursery.start_soon(ask, client, b"lost")
            await trio.sleep(CLOSE_TIMEOUT / 2)
            for name in meanwhile:
                nursery.start_soon(ask, server, name)
                await settle()
        await client.wait_closed()
        assert trio.current_time() == CLOSE_TIMEOUT
        with pytest.raises(ConnectionLost, match="sending failed: nobody reads"):
            await client.request([])
    expected = [(b"long", CLOSE_TIMEOUT)]
    expected += [(name, min(CLOSE_TIMEOUT, CLOSE_TIMEOUT / 2 + lasts[name])) for name in meanwhile]
    assert sorted(ended) == sorted(expected)
