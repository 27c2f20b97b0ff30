"""One message to many, and nobody waits for the slow."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from typing import Any

import pytest
import trio
import trio.testing

from bokbok_trio import Channel, Connection, RemoteError, RequestError
from bokbok_trio.broadcast import Broadcast, Subscription
from bokbok_trio.testing import FaultyStream, open_connection_pair, open_memory_server
from tests.support.helpers import documented_code, settle


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"when_full": "wait"}, "'drop-oldest' or 'close', not 'wait'"),
        ({"when_full": "close", "length": 0}, "at least 1, not 0"),
    ],
)
def test_what_it_cannot_be_is_refused(arguments: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Broadcast[int](**arguments)
    with pytest.raises(TypeError):
        Broadcast()  # type: ignore[call-arg]


@pytest.mark.parametrize("length", [math.inf, math.nan, 2.5, "10", None])
def test_a_queue_without_a_bound_is_refused(length: Any) -> None:
    with pytest.raises(TypeError, match=r"length must be an int, not .*: a queue has a bound"):
        Broadcast[int](when_full="close", length=length)


async def test_everybody_gets_everything_from_when_he_subscribed() -> None:
    broadcast = Broadcast[int](when_full="drop-oldest")
    broadcast.publish(0)
    with broadcast.subscribe() as first:
        broadcast.publish(1)
        with broadcast.subscribe() as second:
            broadcast.publish(2)
            assert len(broadcast) == 2
            assert [await first.receive(), await first.receive()] == [1, 2]
            assert await second.receive() == 2
        broadcast.publish(3)
        broadcast.close()
        broadcast.close()
        assert [message async for message in first] == [3], "what was published before is still received"
        with pytest.raises(trio.EndOfChannel):
            await first.receive()
    assert len(broadcast) == 0
    with pytest.raises(trio.ClosedResourceError):
        await first.receive()
    with pytest.raises(trio.ClosedResourceError, match="this broadcast was closed"):
        broadcast.publish(4)
    with broadcast.subscribe() as late:
        assert [message async for message in late] == []
    assert len(broadcast) == 0


async def test_the_oldest_are_dropped_and_counted() -> None:
    broadcast = Broadcast[int](when_full="drop-oldest", length=3)
    with broadcast.subscribe() as slow, broadcast.subscribe() as fast:
        for number in range(10):
            broadcast.publish(number)
            assert await fast.receive() == number
        assert (slow.dropped, fast.dropped) == (7, 0)
        assert [await slow.receive() for _ in range(3)] == [7, 8, 9]
        broadcast.publish(10)
        assert await slow.receive() == 10
        assert slow.dropped == 7


async def test_a_slow_one_is_closed_whatever_it_waits_for() -> None:
    broadcast = Broadcast[int](when_full="close", length=3)
    with broadcast.subscribe() as fast:
        with pytest.raises(RequestError, match="too slow: 3 messages wait") as caught:
            with broadcast.subscribe():
                for number in range(3):
                    broadcast.publish(number)
                    assert await fast.receive() == number
                broadcast.publish(3)
                await trio.sleep_forever()
        assert caught.value.code == "too-slow"
        assert await fast.receive() == 3
        with pytest.raises(LookupError), broadcast.subscribe():
            raise LookupError
        assert len(broadcast) == 1


async def test_a_cancelled_receive_loses_nothing() -> None:
    broadcast = Broadcast[int](when_full="close")
    with broadcast.subscribe() as messages:
        for number in range(20):
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(messages.receive)
                    await settle()
                    scope.cancel()
            broadcast.publish(number)
            assert await messages.receive() == number


async def test_subscribers_come_and_go_while_it_publishes() -> None:
    broadcast = Broadcast[int](when_full="drop-oldest")

    async def take_one(task_status: trio.TaskStatus[Subscription[int]]) -> None:
        with broadcast.subscribe() as messages:
            task_status.started(messages)
            assert await messages.receive() == 1

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            await nursery.start(take_one)
        broadcast.publish(1)
    assert len(broadcast) == 0


@pytest.mark.parametrize("when_full", ["drop-oldest", "close"])
async def test_a_peer_that_does_not_read_delays_nobody(
    when_full: Any, autojump_clock: trio.testing.MockClock
) -> None:
    """Over a connection: the queue fills once the peer's credit is used up, and the send hangs."""
    broadcast = Broadcast[list[bytes]](when_full=when_full, length=10)
    subscriptions: list[Subscription[list[bytes]]] = []

    async def handler(connection: Connection, request: list[bytes], channel: Channel) -> list[str]:
        if request == [b"own"]:
            with broadcast.subscribe() as messages:
                subscriptions.append(messages)
                async for message in messages:
                    await channel.send(message)
        else:
            await broadcast.forward(channel)
        return ["end"]

    async with (
        open_memory_server(channel_handler=handler) as server,
        server.connect() as slow_client,
        server.connect() as fast_client,
        slow_client.open_channel(["own"]) as slow,
        fast_client.open_channel(["any"]) as fast,
    ):
        await settle()
        for number in range(200):
            broadcast.publish([b"%d" % number, bytes(10_000)])
            assert (await fast.receive())[0] == b"%d" % number
        assert trio.current_time() == 0
        if when_full == "close":
            with pytest.raises(RemoteError) as caught:
                await slow.answer()
            assert caught.value.code == "too-slow"
            assert len(broadcast) == 1
        else:
            broadcast.close()
            received = [int(number) async for number, _ in slow]
            assert received[-10:] == list(range(190, 200))
            assert len(received) + subscriptions[0].dropped == 200
            assert received == sorted(received)
            assert await slow.answer() == [b"end"]
            assert await fast.answer() == [b"end"]


async def test_a_peer_that_has_vanished_costs_no_more_than_its_queue(
    autojump_clock: trio.testing.MockClock,
) -> None:
    streams: list[FaultyStream] = []
    broadcast = Broadcast[list[str]](when_full="drop-oldest", length=10)

    def wrap(transport: trio.abc.HalfCloseableStream) -> FaultyStream:
        streams.append(FaultyStream(transport))
        return streams[0]

    async def handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
        await broadcast.forward(channel)

    async with open_connection_pair(server_channel_handler=handler, wrap=wrap) as (client, server):
        with pytest.raises(trio.BrokenResourceError):
            async with client.open_channel([]) as channel:
                await settle()
                for faults in (streams[0].sending, streams[0].receiving):
                    faults.stall()
                for _ in range(1000):
                    broadcast.publish(["x" * 1000])
                await channel.receive()
        await server.wait_closed()
        assert len(broadcast) == 0


async def test_what_the_documentation_shows() -> None:
    async def market() -> AsyncGenerator[tuple[str, str]]:
        for price in range(150):
            yield "bread", str(price)
        await trio.lowlevel.checkpoint()

    names: dict[str, Any] = {"market": market}
    for code in documented_code("patterns.rst", "prices"):
        exec(code, names)

    async def handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
        name = "channel_handler" if request == [b"prices"] else "frank_handler"
        await names[name](connection, request, channel)

    async with (
        open_connection_pair(server_channel_handler=handler) as (client, _),
        client.open_channel(["prices"]) as short,
        client.open_channel(["frank"]) as frank,
    ):
        await settle()
        await names["watch_the_market"]()
        names["prices"].close()
        kept = [[b"bread", b"%d" % price] for price in range(50, 150)]
        assert [item async for item in short][-99:] == kept[1:]
        heard = [item async for item in frank]
        [missed] = [int(number) for what, number in heard if what == b"missed"]
        assert missed + len(heard) - 1 == 150
        assert heard[-99:] == kept[1:]
