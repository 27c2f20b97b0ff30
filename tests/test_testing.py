from __future__ import annotations

import pytest
import trio
import trio.testing

from bokbok_trio import Connection, open_connection, open_server
from bokbok_trio.testing import FaultyStream, MemoryListener, open_connection_pair
from tests.helpers import echo, settle


async def test_a_pair_is_open_both_ways_in_no_time(
    sealed: bool, autojump_clock: trio.testing.MockClock
) -> None:
    async def on_close(connection: Connection) -> None:
        connection.data = "closed"

    async with open_connection_pair(
        echo, echo, sealed=sealed, client_close_handler=on_close, server_close_handler=on_close
    ) as (client, server):
        assert client.encrypted is sealed
        assert await client.request(["a"]) == [b"a"]
        assert await server.request(["b"]) == [b"b"]
    assert (client.data, server.data) == ("closed", "closed")
    assert trio.current_time() == 0


async def test_a_memory_listener_serves_many_and_then_none() -> None:
    listener = MemoryListener()
    async with open_server([listener], echo):
        for _ in range(3):
            async with open_connection(listener.connect()) as client:
                assert await client.request(["x"]) == [b"x"]
    with pytest.raises(trio.BrokenResourceError):
        listener.connect()


def make_faulty() -> tuple[FaultyStream, trio.abc.Stream]:
    ours, theirs = trio.testing.memory_stream_pair()
    return FaultyStream(ours), theirs


async def test_a_faulty_stream_passes_everything_on_at_first() -> None:
    await trio.testing.check_two_way_stream(make_two_faulty, None)


async def make_two_faulty() -> tuple[FaultyStream, FaultyStream]:
    ours, theirs = trio.testing.memory_stream_pair()
    return FaultyStream(ours), FaultyStream(theirs)


async def test_who_was_not_accepted_is_told_when_the_listener_closes() -> None:
    listener = MemoryListener()
    streams = [listener.connect() for _ in range(3)]
    await listener.aclose()
    await listener.aclose()
    for stream in streams:
        assert await stream.receive_some() == b""


async def test_faults() -> None:
    stream, peer = make_faulty()
    stream.most = 2
    await peer.send_all(b"abcdef")
    assert [await stream.receive_some(), await stream.receive_some(1)] == [b"ab", b"c"]
    stream.alter = bytes.upper
    assert await stream.receive_some() == b"DE"
    stream.broken = True
    with pytest.raises(trio.BrokenResourceError):
        await stream.receive_some()
    with pytest.raises(trio.BrokenResourceError):
        await stream.send_all(b"x")


async def test_a_stalled_stream_sends_when_it_is_resumed_and_wakes_when_it_is_closed() -> None:
    stream, peer = make_faulty()
    sent: list[bytes] = []

    async def send(data: bytes) -> None:
        await stream.send_all(data)
        sent.append(data)

    async with trio.open_nursery() as nursery:
        stream.stall()
        nursery.start_soon(send, b"one")
        await settle()
        stream.stall()
        assert sent == []
        stream.resume()
    assert await peer.receive_some() == b"one"
    stream.stall()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.aclose)
        with pytest.raises(trio.ClosedResourceError):
            await send(b"two")
