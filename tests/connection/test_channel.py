"""Channels over a connection: what Trio says of a channel, and what a request adds to it."""

from __future__ import annotations

import math
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from bokbok_trio import (
    Channel,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    MessageTooLarge,
    RemoteError,
    RequestError,
    Settings,
)
from bokbok_trio._protocol.flow_control import ITEM_COST, ITEM_OVERHEAD, MAX_QUEUED, WINDOW
from bokbok_trio._trio_util import LazyEvent
from bokbok_trio.testing import FaultyStream, open_connection_pair
from tests.support.helpers import RawPeer, packet, raw_peer, settle


async def echo_items(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
    async for item in channel:
        await channel.send(item)
    return request


class Handler:
    """A channel handler that gives its channel to the test, and ends as the test says."""

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
    """A client, a server, and both ends of a channel: that of the client, and its handler."""
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
        session = connection._session
        assert not connection._channels
        assert not connection._calls._calls
        assert not connection._handlers
        if not connection.closed:
            assert not len(session.flow_control)
            assert not session.local.states
            assert not session.remote.answer_sizes
        outbox = session._outbox
        assert not any(
            (outbox._small, outbox._items, outbox._big, outbox._in_pieces, outbox._blocked_by_order)
        )


async def test_items_go_both_ways_and_then_the_answer_comes(sealed: bool, autojump_clock: MockClock) -> None:
    async with open_connection_pair(sealed=sealed, server_channel_handler=echo_items) as (client, server):
        async with client.open_channel(["a", b"b"]) as channel:
            items: list[list[bytes | str]]
            items = [[], [b""], ["text", b"bytes"], [bytes(10**6)], [b"x"] * 255]
            for item in items:
                await channel.send(item)
                received = await channel.receive()
                assert received == [field.encode() if isinstance(field, str) else field for field in item]
            await channel.end()
            with pytest.raises(trio.EndOfChannel):
                await channel.receive()
            assert await channel.answer() == await channel.answer() == [b"a", b"b"]
        await settle()
        assert_nothing_is_left(client, server)


async def test_the_server_may_open_one_too(autojump_clock: MockClock) -> None:
    async with open_connection_pair(client_channel_handler=echo_items) as (_, server):
        async with server.open_channel(["hi"]) as channel:
            await channel.send(["1"])
            assert await channel.receive() == [b"1"]
            await channel.end()
            assert await channel.answer() == [b"hi"]


async def test_a_channel_inside_the_handler_of_a_channel(autojump_clock: MockClock) -> None:
    async def relay(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
        async with connection.open_channel(request) as inner:
            async for item in channel:
                await inner.send([b"there", *item])
                await channel.send([*await inner.receive(), b"and back"])
            await inner.end()
            return await inner.answer()

    handlers = {"server_channel_handler": relay, "client_channel_handler": echo_items}
    async with open_connection_pair(**handlers) as (client, server):  # type: ignore[arg-type]
        async with client.open_channel(["name"]) as channel:
            await channel.send(["x"])
            assert await channel.receive() == [b"there", b"x", b"and back"]
            await channel.end()
            assert await channel.answer() == [b"name"]
        await settle()
        assert_nothing_is_left(client, server)


async def test_two_thousand_channels_on_one_connection(autojump_clock: MockClock) -> None:
    settings = Settings(max_requests=2000)
    most = 0

    async def use(connection: Connection, n: int) -> None:
        async with connection.open_channel([str(n)]) as channel:
            await channel.send([f"item of {n}"])
            assert await channel.receive() == [b"item of %d" % n]
            await everybody_is_here(n)
            await channel.end()
            assert await channel.answer() == [b"%d" % n]

    arrived = 0
    all_arrived = trio.Event()

    async def everybody_is_here(n: int) -> None:
        nonlocal arrived, most
        arrived += 1
        most = max(most, server._session.handling)
        if arrived == 2000:
            all_arrived.set()
        await all_arrived.wait()

    pair = open_connection_pair(sealed=False, server_channel_handler=echo_items, server_settings=settings)
    async with pair as (client, server):
        async with trio.open_nursery() as nursery:
            for n in range(2000):
                nursery.start_soon(use, client, n)
        assert most == 2000
        await settle()
        assert_nothing_is_left(client, server)


async def test_a_channel_takes_a_slot_and_waits_for_one(autojump_clock: MockClock) -> None:
    async with open_pair(max_requests=1) as (client, server, channel, handler):
        async with client.open_channel(["second"]) as second:
            with trio.move_on_after(5) as scope:
                await second.send(["waits"])
            assert scope.cancelled_caught
            await second.end()
            assert server._session.handling == 1
            handler.may_end.set()
            assert await channel.answer() == [b"re: ", b"hello"]
            assert await second.answer() == [b"re: ", b"second"]


async def test_one_that_waits_for_a_slot_can_be_given_up(autojump_clock: MockClock) -> None:
    async with open_pair(max_requests=1) as (client, _, _, handler):
        async with client.open_channel(["never seen"]):
            await settle()
        assert len(client._session.flow_control) == 1
        handler.may_end.set()


# ---- what Trio says of a channel ----


async def test_every_method_is_a_checkpoint(autojump_clock: MockClock) -> None:
    async with open_pair() as (client, _, channel, handler):
        await handler.channel.send(["x"])
        await handler.channel.send(["y"])
        await settle()
        with trio.testing.assert_checkpoints():
            await channel.send(["x"])
        with trio.testing.assert_checkpoints():
            await channel.receive()
        for method in (
            lambda: channel.send(["lost"]),
            channel.receive,
            lambda: client.open_channel([]).__aenter__(),
        ):
            with trio.CancelScope() as scope:
                scope.cancel()
                with trio.testing.assert_checkpoints():
                    await method()
            assert scope.cancelled_caught
        assert await channel.receive() == [b"y"]
        for end in (channel.end, channel.end):
            with trio.testing.assert_checkpoints():
                await end()
        with trio.testing.assert_checkpoints(), pytest.raises(trio.ClosedResourceError):
            await channel.send([])
        handler.may_end.set()
        with trio.testing.assert_checkpoints():
            await channel.answer()
        with trio.testing.assert_checkpoints():
            await channel.answer()
        for close in (channel.aclose, channel.aclose):
            with trio.testing.assert_checkpoints():
                await close()
        with trio.testing.assert_checkpoints(), pytest.raises(trio.ClosedResourceError):
            await channel.receive()
        assert "closed" in repr(channel)


async def test_receiving_ends_after_the_last_item(autojump_clock: MockClock) -> None:
    async with open_pair() as (_, _, channel, handler):
        assert "open" in repr(channel)
        await channel.send(["1"])
        await channel.send(["2"])
        await channel.end()
        await settle()
        assert [item async for item in handler.channel] == [[b"1"], [b"2"]]
        for _ in range(2):
            with pytest.raises(trio.EndOfChannel):
                await handler.channel.receive()
        await handler.channel.send(["the other direction goes on"])
        assert await channel.receive() == [b"the other direction goes on"]
        handler.may_end.set()


async def test_a_receiver_that_waits_is_told_of_the_end(autojump_clock: MockClock) -> None:
    async with open_pair() as (_, _, channel, handler):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def receive() -> None:
                with pytest.raises(trio.EndOfChannel):
                    await channel.receive()

            await settle()
            await handler.channel.end()


async def test_what_is_no_item_is_refused_and_harms_nothing(autojump_clock: MockClock) -> None:
    async with open_pair() as (_, _, channel, handler):
        with pytest.raises(TypeError):
            await channel.send("text")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="255"):
            await channel.send([b""] * 256)
        with pytest.raises(MessageTooLarge):
            await channel.send([bytes(4 * 2**20)])
        await channel.send(["good"])
        assert await handler.channel.receive() == [b"good"]


@pytest.mark.parametrize("how", ["end", "aclose"])
async def test_sending_after_our_end_and_while_it_comes(how: str, autojump_clock: MockClock) -> None:
    async with open_pair() as (_, _, channel, handler):
        await fill(channel)
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def send() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await channel.send(["never leaves"])

            await settle()
            await getattr(channel, how)()
        with pytest.raises(trio.ClosedResourceError):
            await channel.send([])
        handler.may_end.set()


async def test_receiving_while_it_is_closed(autojump_clock: MockClock) -> None:
    async with open_pair() as (_, _, channel, handler):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def receive() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await channel.receive()

            @nursery.start_soon
            async def wait() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await channel.answer()

            await settle()
            await channel.aclose()
        await settle()
        assert isinstance(handler.ended_by, trio.Cancelled)


async def fill(channel: Channel) -> int:
    """Send until it would wait; return how many bytes of bodies that was."""
    size = 0
    with trio.move_on_after(1) as scope:
        while True:
            await channel.send([bytes(1000 - 5)])
            size += 1000
    assert scope.cancelled_caught
    return size


async def test_a_slow_reader_holds_a_fast_writer_and_memory(autojump_clock: MockClock) -> None:
    async with open_pair() as (_, _, channel, handler):
        slow = handler.channel
        sent = await fill(channel)
        cost = sent + sent // 1000 * ITEM_COST
        assert WINDOW <= cost < WINDOW + 1000 + ITEM_COST
        assert sum(map(len, slow._buffer)) == sent
        received = most = 0
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def write() -> None:
                for _ in range(2000):
                    await channel.send([bytes(1000 - 5)])
                await channel.end()

            async for _ in slow:
                await trio.sleep(0.01)
                received += 1
                most = max(most, sum(map(len, slow._buffer)))
                assert channel._flow_control.credits[0].queued < MAX_QUEUED + 1000
        assert received == sent // 1000 + 2000
        assert most < WINDOW + 1000
        handler.may_end.set()


async def test_small_items_take_up_no_multiple_of_the_window(autojump_clock: MockClock) -> None:
    async with raw_peer() as (connection, peer), connection.open_channel([]) as channel:
        await receive_chan(peer)
        await peer.stream.send_all(packet(b"item", b"0", body=[]) * 1900)
        await settle()
        buffer = channel._buffer
        assert len(buffer) == 1900
        # Python has one object for each single byte.
        assert all(body is buffer[0] for body in buffer)
        channel._buffer.clear()
        await peer.stream.send_all(packet(b"item", b"0", body=[b""]) * 1900)
        await settle()
        assert sum(sys.getsizeof(body) + 8 for body in channel._buffer) < 1900 * 60


async def test_leaving_grants_no_credit_for_what_nobody_read(autojump_clock: MockClock) -> None:
    async with raw_peer() as (connection, peer):
        async with connection.open_channel([]):
            await receive_chan(peer)
            await peer.stream.send_all(
                packet(b"item", b"0", body=[bytes(1019)]) * (WINDOW // (1024 + ITEM_COST))
            )
            await settle()
        assert await peer.receive() == [b"cancel", b"0"]
        connection.drain()
        assert await peer.receive() == [b"bye"]


async def test_a_handler_that_returns_grants_no_credit_for_what_it_did_not_read(
    autojump_clock: MockClock,
) -> None:
    handler = Handler()
    async with raw_peer(channel_handler=handler) as (_, peer):
        await peer.send(b"chan", b"1", b"", b"", b"", b"0", body=[])
        assert (await peer.receive())[0] == b"credit"
        await peer.stream.send_all(packet(b"item", b"1", body=[bytes(1019)]) * (WINDOW // (1024 + ITEM_COST)))
        await settle()
        handler.may_end.set()
        assert (await peer.receive())[:2] == [b"ok", b"1"]


async def test_a_shielded_handler_that_was_cancelled_gathers_nothing(autojump_clock: MockClock) -> None:
    channels: list[Channel] = []

    async def handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
        channels.append(channel)
        with trio.CancelScope(shield=True):
            await trio.sleep(5)

    async with raw_peer(channel_handler=handler) as (_, peer):
        await peer.send(b"chan", b"1", b"", b"", b"", b"0", body=[])
        assert (await peer.receive())[0] == b"credit"
        await peer.send(b"item", b"1", body=[b"before"])
        await peer.send(b"cancel", b"1")
        await peer.send(b"item", b"1", body=[b"after"])
        await settle()
        assert await channels[0].receive() == [b"before"]
        with pytest.raises(trio.BrokenResourceError):
            await channels[0].receive()


async def test_the_sending_side_holds_little_where_the_transport_is_stuck(autojump_clock: MockClock) -> None:
    streams: list[FaultyStream] = []

    def wrap(stream: trio.abc.HalfCloseableStream) -> FaultyStream:
        streams.append(FaultyStream(stream))
        return streams[0]

    pair = open_connection_pair(server_channel_handler=echo_items, wrap=wrap, sealed=False)
    async with pair as (client, _), client.open_channel([]) as channel:
        await channel.send(["1"])
        await channel.receive()
        streams[0].sending.stall()
        assert await fill(channel) <= MAX_QUEUED + 2**16 + 1000
        assert 0 < len(client._session._outbox) <= MAX_QUEUED / (1000 + ITEM_OVERHEAD) + 1
        with trio.fail_after(5):
            streams[0].sending.resume()
            await channel.send(["goes on"])


async def test_an_item_larger_than_the_window_passes(autojump_clock: MockClock) -> None:
    async with open_connection_pair(server_channel_handler=echo_items) as (client, _):
        async with client.open_channel([]) as channel:
            for _ in range(3):
                await channel.send([bytes(3 * 2**20)])
                assert await channel.receive() == [bytes(3 * 2**20)]


async def test_many_senders_and_receivers_are_served_in_turn(autojump_clock: MockClock) -> None:
    received: list[tuple[int, list[bytes]]] = []
    async with open_pair() as (_, _, channel, handler):
        theirs = handler.channel

        async def receive(n: int) -> None:
            received.append((n, await theirs.receive()))

        async with trio.open_nursery() as nursery:
            for n in range(3):
                nursery.start_soon(receive, n)
                await settle()
            for n in range(3):
                await channel.send([str(n)])
        assert sorted(received) == [(0, [b"0"]), (1, [b"1"]), (2, [b"2"])]

        await fill(channel)
        async with trio.open_nursery() as nursery:
            for n in range(3):
                nursery.start_soon(channel.send, [str(n)])
                await settle()
            await settle()
            items: list[list[bytes]] = []
            with trio.move_on_after(1):
                while True:
                    items.append(await theirs.receive())
        assert items[-3:] == [[b"0"], [b"1"], [b"2"]]


@pytest.mark.parametrize("which", ["send", "receive"])
async def test_cancelling_loses_and_repeats_nothing(which: str, autojump_clock: MockClock) -> None:
    """The waiting task is cancelled after so many steps of the scheduler, around when it would be done."""
    channel: Channel
    theirs: Channel
    done: list[list[bytes]] = []

    async def send(scope: trio.CancelScope) -> None:
        with scope:
            await channel.send(["it"])
            done.append([b"it"])

    async def receive(scope: trio.CancelScope) -> None:
        with scope:
            done.append(await theirs.receive())

    for steps in range(40):
        async with open_pair() as (_, _, channel, handler):
            theirs = handler.channel
            before = await fill(channel) // 1000 if which == "send" else 0
            done.clear()
            scope = trio.CancelScope()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send if which == "send" else receive, scope)
                await settle()
                if which == "send":
                    for _ in range(before):
                        await theirs.receive()
                else:
                    await channel.send(["it"])
                for _ in range(steps):
                    await trio.lowlevel.cancel_shielded_checkpoint()
                scope.cancel()
            await channel.send(["last"])
            await channel.end()
            rest = [item async for item in theirs]
            if which == "receive":
                rest = done + rest
            assert rest == ([[b"it"]] if done or which == "receive" else []) + [[b"last"]]
            handler.may_end.set()


@pytest.mark.parametrize("which", ["send", "receive"])
async def test_cancelling_what_need_not_wait_loses_and_repeats_nothing(
    which: str, autojump_clock: MockClock
) -> None:
    done: list[list[bytes]] = []

    async def work(scope: trio.CancelScope, channel: Channel, theirs: Channel) -> None:
        with scope:
            if which == "send":
                await channel.send(["it"])
                done.append([b"it"])
            else:
                done.append(await theirs.receive())

    for steps in range(5):
        done.clear()
        async with open_pair() as (_, _, channel, handler):
            if which == "receive":
                await channel.send(["it"])
            await settle()
            scope = trio.CancelScope()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(work, scope, channel, handler.channel)
                for _ in range(steps):
                    await trio.lowlevel.cancel_shielded_checkpoint()
                scope.cancel()
            await channel.end()
            rest = [item async for item in handler.channel]
            assert done + rest == ([[b"it"]] if which == "receive" else done * 2)
            handler.may_end.set()


async def test_a_writer_with_plenty_of_credit_goes_on_as_its_items_leave(autojump_clock: MockClock) -> None:
    async with raw_peer() as (connection, peer), connection.open_channel([]) as channel:
        await receive_chan(peer)
        await peer.send(b"credit", b"0", b"%d" % 2**30)
        with trio.fail_after(5):
            for _ in range(3):
                await channel.send([bytes(MAX_QUEUED)])  # the next one waits until it has left


# ---- answers ----


async def test_the_answer_comes_after_the_items_sent_before(autojump_clock: MockClock) -> None:
    async def handler(connection: Connection, request: list[bytes], channel: Channel) -> list[str]:
        await channel.send([bytes(2**17)])
        for n in range(5):
            await channel.send([str(n)])
        return ["answer"]

    async with open_connection_pair(server_channel_handler=handler) as (client, _):
        async with client.open_channel([]) as channel:
            assert await channel.answer() == [b"answer"]
            items = [item async for item in channel]
            assert items == [[bytes(2**17)], *([b"%d" % n] for n in range(5))]
            with pytest.raises(trio.BrokenResourceError, match="has answered"):
                await channel.send([])


async def test_an_error_of_the_handler(autojump_clock: MockClock) -> None:
    async with open_pair() as (_, _, channel, handler):
        handler.error = RequestError("no such file", code="no-file")
        await handler.channel.send(["first"])
        await settle()
        handler.may_end.set()
        await settle()
        assert "broken" in repr(channel)
        assert await channel.receive() == [b"first"]
        for use in (channel.receive, lambda: channel.send([])):
            with pytest.raises(trio.BrokenResourceError, match="no such file") as caught:
                await use()
            assert isinstance(caught.value.__cause__, RemoteError)
        with pytest.raises(RemoteError, match="no such file"):
            await channel.answer()


async def test_an_error_after_the_end_does_not_cut_the_items_short(autojump_clock: MockClock) -> None:
    async with open_pair() as (_, _, channel, handler):
        handler.error = RequestError("too late", code="late")
        await handler.channel.send(["all"])
        await handler.channel.end()
        handler.may_end.set()
        await settle()
        assert [item async for item in channel] == [[b"all"]]


async def test_those_who_wait_are_told_of_an_error(autojump_clock: MockClock) -> None:
    async with open_pair() as (_, _, channel, handler):
        handler.error = RequestError("bad", code="bad")
        await fill(channel)
        async with trio.open_nursery() as nursery:
            for use in (channel.receive, lambda: channel.send([])):

                @nursery.start_soon
                async def wait(use: object = use) -> None:
                    with pytest.raises(trio.BrokenResourceError, match="bad"):
                        await use()  # type: ignore[operator]

            await settle()
            handler.may_end.set()


async def test_a_handler_cannot_wait_for_its_own_answer(autojump_clock: MockClock) -> None:
    async with open_pair() as (_, _, _, handler):
        with pytest.raises(RuntimeError, match="gives the answer"):
            await handler.channel.answer()


async def test_without_a_channel_handler(autojump_clock: MockClock) -> None:
    async with open_connection_pair() as (client, server):
        async with client.open_channel([]) as channel:
            with pytest.raises(RemoteError) as caught:
                await channel.answer()
            assert caught.value.code == "no-channel"
        with pytest.raises(RemoteError) as caught:
            await client.request([])
        assert caught.value.code == "no-handler"
        await settle()
        assert_nothing_is_left(client, server)


async def test_the_handlers_channel_is_closed_when_it_returns(autojump_clock: MockClock) -> None:
    async with open_pair() as (_, _, channel, handler):
        await channel.send(["not read"])
        await settle()
        handler.may_end.set()
        assert await channel.answer()
        for use in (handler.channel.receive, lambda: handler.channel.send([])):
            with pytest.raises(trio.ClosedResourceError):
                await use()
        await handler.channel.end()
        await handler.channel.aclose()


async def test_a_handler_that_closes_its_channel_drops_what_comes(autojump_clock: MockClock) -> None:
    async with open_pair() as (_, _, channel, handler):
        await fill(channel)
        await handler.channel.aclose()
        with pytest.raises(trio.EndOfChannel):
            await channel.receive()
        for _ in range(1000):
            await channel.send([bytes(1000)])
        handler.may_end.set()
        assert await channel.answer() == [b"re: ", b"hello"]


# ---- leaving ----


async def test_leaving_early_cancels_the_handler(autojump_clock: MockClock) -> None:
    async with open_pair() as (_, _, channel, handler):
        await handler.channel.send(["unread"])
        await channel.send([bytes(2**20)])
    assert isinstance(handler.ended_by, trio.Cancelled)


async def test_an_exception_of_the_block_cancels_and_comes_out_as_itself(autojump_clock: MockClock) -> None:
    handler = Handler()
    async with open_connection_pair(server_channel_handler=handler) as (client, server):
        with pytest.raises(KeyError):
            async with client.open_channel([]) as channel:
                await channel.end()
                await settle()
                raise KeyError
        await settle()
        assert isinstance(handler.ended_by, trio.Cancelled)
        assert_nothing_is_left(client, server)


async def test_leaving_after_the_end_waits_for_the_answer(autojump_clock: MockClock) -> None:
    async def upload(connection: Connection, request: list[bytes], channel: Channel) -> None:
        items = [item async for item in channel]
        await trio.sleep(5)
        for _ in range(1000):
            await channel.send([bytes(1000)])  # nobody takes them, and nobody need wait for it
        stored.extend(items)

    stored: list[list[bytes]] = []
    async with open_connection_pair(server_channel_handler=upload) as (client, server):
        async with client.open_channel([]) as channel:
            await channel.send(["x"])
            await channel.end()
        assert stored == [[b"x"]]
        assert trio.current_time() == 5
        await settle()
        assert_nothing_is_left(client, server)


@pytest.mark.parametrize("told", [False, True])
async def test_leaving_after_the_end_tells_of_an_error_once(told: bool, autojump_clock: MockClock) -> None:
    handler = Handler()
    handler.error = RequestError("disk full", code="full")
    handler.may_end.set()

    async def upload() -> None:
        async with client.open_channel([]) as channel:
            await channel.end()
            await settle()
            if told:
                with pytest.raises(RemoteError):
                    await channel.answer()

    async with open_connection_pair(server_channel_handler=handler) as (client, _):
        if told:
            await upload()
        else:
            with pytest.raises(RemoteError, match="disk full"):
                await upload()


async def test_leaving_after_the_end_and_aclose_cancels(autojump_clock: MockClock) -> None:
    async with open_pair() as (_, _, channel, handler):
        await channel.end()
        await channel.aclose()
    assert isinstance(handler.ended_by, trio.Cancelled)


async def test_the_wait_on_leaving_can_be_cancelled(autojump_clock: MockClock) -> None:
    with trio.move_on_after(3) as scope:
        async with open_pair() as (_, _, channel, _):
            await channel.end()
    assert scope.cancelled_caught
    assert trio.current_time() == 3


# ---- cancellation and deadlines ----


async def test_a_handler_that_is_shielded_sees_the_channel_broken(autojump_clock: MockClock) -> None:
    seen: list[Exception] = []

    async def handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 60):
            assert await channel.receive() == [b"x"]
            for use in (channel.receive, lambda: channel.send([])):
                try:
                    await use()
                except trio.BrokenResourceError as exc:
                    seen.append(exc)

    async with open_connection_pair(server_channel_handler=handler) as (client, server):
        async with client.open_channel([]) as channel:
            await channel.send(["x"])
            await settle()
        await settle()
        assert ["cancelled" in str(exc) for exc in seen] == [True, True]
        assert_nothing_is_left(client, server)


async def test_the_deadline_crosses_and_is_seen_as_our_own(autojump_clock: MockClock) -> None:
    deadlines: list[float] = []

    async def handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
        deadlines.append(trio.current_effective_deadline())
        await channel.receive()

    async with open_connection_pair(server_channel_handler=handler) as (client, _):
        with trio.move_on_after(7) as scope:
            async with client.open_channel([]) as channel:
                await channel.receive()
        assert scope.cancelled_caught
        assert deadlines == [7]
        assert trio.current_time() == 7


@pytest.mark.parametrize("use", ["receive", "send", "answer"])
async def test_a_timeout_over_there_that_is_early_is_held(use: str, autojump_clock: MockClock) -> None:
    async with raw_peer() as (connection, peer):
        with trio.move_on_after(7) as scope:
            async with connection.open_channel([]) as channel:
                await settle()
                await receive_chan(peer)
                await trio.sleep_until(6.96)
                await peer.send(b"err", b"0", b"timeout", b"", b"")
                await settle()
                await (channel.send([]) if use == "send" else getattr(channel, use)())
        assert scope.cancelled_caught
        assert trio.current_time() == 7


@pytest.mark.parametrize("use", ["receive", "send", "answer"])
async def test_whoever_waits_for_an_early_timeout_to_be_due_is_told_when_it_is(
    use: str, autojump_clock: MockClock
) -> None:
    """Outside of the scope that gave the deadline, it is an error like any other."""
    async with raw_peer() as (connection, peer), trio.open_nursery() as nursery:
        with trio.CancelScope(deadline=7) as scope:
            opening = connection.open_channel([])
            channel = await opening.__aenter__()
            scope.deadline = math.inf
        await receive_chan(peer)
        caught: list[tuple[type[Exception], float]] = []

        @nursery.start_soon
        async def wait() -> None:
            try:
                await (channel.send([]) if use == "send" else getattr(channel, use)())
            except Exception as exc:
                caught.append((type(exc), trio.current_time()))

        await trio.sleep_until(6.96)
        await peer.send(b"err", b"0", b"timeout", b"", b"")
        await trio.sleep_until(8)
        assert caught == [(RemoteError if use == "answer" else trio.BrokenResourceError, 7)]
        with suppress(RemoteError):
            await opening.__aexit__(None, None, None)


@pytest.mark.parametrize("use", ["receive", "send", "answer"])
async def test_closing_tells_those_who_wait_for_an_early_timeout(use: str, autojump_clock: MockClock) -> None:
    async with raw_peer() as (connection, peer):
        with trio.fail_after(7):
            async with connection.open_channel([]) as channel, trio.open_nursery() as nursery:
                await receive_chan(peer)
                await trio.sleep_until(6.96)
                await peer.send(b"err", b"0", b"timeout", b"", b"")
                await settle()

                @nursery.start_soon
                async def wait() -> None:
                    with pytest.raises(trio.ClosedResourceError):
                        await (channel.send([]) if use == "send" else getattr(channel, use)())

                await settle()
                await channel.aclose()
                with pytest.raises(trio.ClosedResourceError):
                    await channel.send([])
        assert trio.current_time() < 7


async def test_an_early_timeout_after_the_end_is_no_error_of_receiving(autojump_clock: MockClock) -> None:
    async with raw_peer() as (connection, peer):
        with trio.move_on_after(7):
            async with connection.open_channel([]) as channel:
                await receive_chan(peer)
                await trio.sleep_until(6.96)
                await peer.stream.send_all(packet(b"item", b"0", body=[b"x"]) + packet(b"end", b"0"))
                await peer.send(b"err", b"0", b"timeout", b"", b"")
                await settle()
                assert [item async for item in channel] == [[b"x"]]
                assert trio.current_time() < 7


@pytest.mark.parametrize("deadline", [1, 1000, math.inf])
async def test_a_timeout_that_is_far_too_early_is_the_handlers_own(
    deadline: float, autojump_clock: MockClock
) -> None:
    async with raw_peer() as (connection, peer):
        with trio.CancelScope(deadline=deadline):
            async with connection.open_channel([]) as channel:
                await peer.receive()
                await peer.send(b"err", b"0", b"timeout", b"why", b"")
                with pytest.raises(RemoteError, match="why"):
                    await channel.answer()
                assert trio.current_time() == 0


async def test_a_timeout_of_the_handlers_own_is_an_error(autojump_clock: MockClock) -> None:
    async with raw_peer() as (connection, peer), connection.open_channel([]) as channel:
        await receive_chan(peer)
        await peer.send(b"err", b"0", b"timeout", b"why", b"")
        with pytest.raises(RemoteError, match="why"):
            await channel.answer()
        assert trio.current_time() == 0


# ---- the connection ends ----


@pytest.mark.parametrize("ours", [False, True])
async def test_the_connection_ends_under_all_who_wait(ours: bool, autojump_clock: MockClock) -> None:
    async with open_pair() as (client, server, channel, handler):
        theirs = handler.channel
        await fill(channel)
        error = ConnectionClosed if ours else ConnectionLost
        async with trio.open_nursery() as nursery:
            for use in (channel.receive, lambda: channel.send([]), channel.answer):

                @nursery.start_soon
                async def wait(use: object = use) -> None:
                    with pytest.raises(error):
                        await use()  # type: ignore[operator]

            await settle()
            await (client if ours else server).aclose()
        for use in (channel.receive, lambda: channel.send([]), channel.answer):
            with pytest.raises(error):
                await use()
        await settle()
        with pytest.raises(trio.ClosedResourceError):
            await theirs.receive()
        with pytest.raises(error):
            async with client.open_channel([]):
                raise AssertionError


async def test_what_came_before_the_loss_can_still_be_received(autojump_clock: MockClock) -> None:
    async with open_pair() as (_, server, channel, handler):
        await handler.channel.send(["came"])
        await settle()
        await server.aclose()
        await settle()
        assert await channel.receive() == [b"came"]
        with pytest.raises(ConnectionLost) as caught:
            await channel.receive()
        assert caught.value.may_have_run


async def test_after_our_own_close_nothing_is_received(autojump_clock: MockClock) -> None:
    async with open_pair() as (client, _, channel, handler):
        await handler.channel.send(["came"])
        await settle()
        await client.aclose()
        with pytest.raises(ConnectionClosed):
            await channel.receive()


async def test_a_peer_that_drains_takes_no_new_channel(autojump_clock: MockClock) -> None:
    async with open_pair(max_requests=1) as (client, server, channel, handler):
        async with client.open_channel(["waits"]) as waits:
            server.drain()
            with pytest.raises(ConnectionLost, match="no new request") as caught:
                await waits.answer()
            assert not caught.value.may_have_run
        with pytest.raises(ConnectionLost, match="no new request"):
            async with client.open_channel([]):
                raise AssertionError
        await channel.send(["goes on"])
        assert await handler.channel.receive() == [b"goes on"]
        assert not server.closed
        handler.may_end.set()
        assert await channel.answer()
        await server.wait_closed()


async def test_one_that_is_cancelled_before_the_open_handler_is_done(autojump_clock: MockClock) -> None:
    async with raw_peer(channel_handler=echo_items) as (connection, peer):
        connection._handlers.ready = LazyEvent()  # as if the open handler were at work
        await peer.send(b"chan", b"1", b"", b"", b"", b"0", body=[])
        await peer.send(b"cancel", b"1")
        assert await peer.receive() == [b"credit", b"1", b"%d" % WINDOW]
        assert (await peer.receive())[:3] == [b"err", b"1", b"cancelled"]
        assert_nothing_is_left(connection)
        connection._handlers.ready.set()


# ---- a peer that is made by hand ----


async def test_a_handler_does_not_overtake_a_sender_that_waited_for_credit() -> None:
    """Its request comes together with that credit, so it runs before the other task is woken."""

    async def handler(connection: Connection, request: list[bytes]) -> None:
        await channel.send([b"second"])

    async with raw_peer(handler) as (connection, peer):
        async with connection.open_channel([]) as channel, trio.open_nursery() as nursery:
            assert (await peer.receive())[0] == b"chan"
            nursery.start_soon(channel.send, [b"first"])
            await settle()
            await peer.stream.send_all(
                packet(b"credit", b"0", b"1") + packet(b"req", b"1", b"", b"", b"", body=[])
            )
            assert (await peer.receive())[2].endswith(b"first")
            await peer.send(b"credit", b"0", b"100")
            nursery.cancel_scope.cancel()


async def receive_chan(peer: RawPeer) -> None:
    chan = await peer.receive()
    assert chan[:2] == [b"chan", b"0"]
    assert chan[3:] == [b"", b"", b"%d" % WINDOW, b"\0"]


async def test_the_packets_of_a_channel_that_we_open(autojump_clock: MockClock) -> None:
    async with raw_peer() as (connection, peer), connection.open_channel([]) as channel:
        await receive_chan(peer)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.send, ["waits for credit"])
            await settle()
            await peer.send(b"credit", b"0", b"1")
            assert await peer.receive() == [b"item", b"0", b"\1\0\0\0\x10waits for credit"]
        for _ in range(5):
            await peer.send(b"item", b"0", body=[bytes(2**15)])
            assert await channel.receive() == [bytes(2**15)]
        assert await peer.receive() == [b"credit", b"0", b"%d" % (4 * (2**15 + 5 + ITEM_COST))]
        await channel.end()
        assert await peer.receive() == [b"end", b"0"]
        await peer.send(b"end", b"0")
        with pytest.raises(trio.EndOfChannel):
            await channel.receive()
        await peer.send(b"ok", b"0", body=[b"answer"])
        assert await channel.answer() == [b"answer"]


async def test_what_crosses_our_cancel_and_our_answer_is_dropped(autojump_clock: MockClock) -> None:
    async with raw_peer(channel_handler=echo_items) as (connection, peer):
        async with connection.open_channel([]):
            await receive_chan(peer)
        assert await peer.receive() == [b"cancel", b"0"]
        await peer.send(b"credit", b"0", b"100")
        await peer.send(b"item", b"0", body=[b"crosses"])
        await peer.send(b"end", b"0")
        await peer.send(b"ok", b"0", body=[])
        await peer.send(b"item", b"0", body=[b"late"])
        await peer.send(b"chan", b"1", b"", b"", b"", b"100", body=[])
        assert await peer.receive() == [b"credit", b"1", b"%d" % WINDOW]
        await peer.send(b"end", b"1")
        assert await peer.receive() == [b"ok", b"1", b"\0"]
        for late in ([b"credit", b"1", b"5"], [b"end", b"1"], [b"item", b"1", b"\0"]):
            await peer.send(*late)
        await settle()
        assert not connection.closed
        assert_nothing_is_left(connection)


async def test_items_that_come_after_the_handler_has_ended_are_dropped(autojump_clock: MockClock) -> None:
    async def handler(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
        await trio.lowlevel.checkpoint()
        return [bytes(2**18)]

    async with raw_peer(channel_handler=handler) as (connection, peer):
        await peer.send(b"chan", b"1", b"", b"", b"", b"0", body=[])
        assert (await peer.receive())[0] == b"credit"
        assert (await peer.receive())[0] == b"part"
        assert connection._session.handling == 1
        await peer.send(b"item", b"1", body=[b"dropped"])
        await peer.send(b"cancel", b"1")
        while (await peer.receive())[2] != b"0":
            pass
        await settle()
        assert not connection.closed


@pytest.mark.parametrize("bad", ["credit", "end", "flood"])
async def test_a_lying_peer_loses_the_connection(bad: str, autojump_clock: MockClock) -> None:
    async with raw_peer() as (connection, peer), connection.open_channel([]) as channel:
        await receive_chan(peer)
        if bad == "flood":
            await peer.send(b"item", b"0", body=[bytes(2**15)])
            for _ in range(8):
                await peer.send(b"item", b"0", body=[bytes(2**15)])
        elif bad == "end":
            await peer.send(b"end", b"0")
            await peer.send(b"end", b"0")
        else:
            await peer.send(b"credit", b"0", b"9" * 18)
        with pytest.raises(ConnectionLost, match="broke the protocol"):
            await channel.answer()
        assert sum(map(len, channel._buffer)) < WINDOW + 2**16
