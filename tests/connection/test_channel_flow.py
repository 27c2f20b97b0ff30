"""Channels hold a bounded number of bytes, and cancelling loses and repeats nothing."""

from __future__ import annotations

import sys

import pytest
import trio
from trio.testing import MockClock

from bokbok_trio import Channel, Connection
from bokbok_trio._protocol.flow_control import ITEM_COST, ITEM_OVERHEAD, MAX_QUEUED, WINDOW
from bokbok_trio.testing import FaultyStream, open_connection_pair
from tests.support.channels import Handler, echo_items, fill, open_pair, receive_chan
from tests.support.helpers import packet, raw_peer, settle
from tests.support.inside import items_held, session_of


async def test_a_slow_reader_holds_a_fast_writer_and_memory(autojump_clock: MockClock) -> None:
    async with open_pair() as (client, _, channel, handler):
        slow = handler.channel
        sent = await fill(channel)
        cost = sent + sent // 1000 * ITEM_COST
        assert WINDOW <= cost < WINDOW + 1000 + ITEM_COST
        assert sum(map(len, items_held(slow))) == sent
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
                most = max(most, sum(map(len, items_held(slow))))
                assert session_of(client).flow_control.credits[0].queued < MAX_QUEUED + 1000
        assert received == sent // 1000 + 2000
        assert most < WINDOW + 1000
        handler.may_end.set()


async def test_small_items_take_up_no_multiple_of_the_window(autojump_clock: MockClock) -> None:
    async with raw_peer() as (connection, peer), connection.open_channel([]) as channel:
        await receive_chan(peer)
        await peer.stream.send_all(packet(b"item", b"0", body=[]) * 1900)
        await settle()
        buffer = items_held(channel)
        assert len(buffer) == 1900
        # Python has one object for each single byte.
        assert all(body is buffer[0] for body in buffer)
        buffer.clear()
        await peer.stream.send_all(packet(b"item", b"0", body=[b""]) * 1900)
        await settle()
        assert sum(sys.getsizeof(body) + 8 for body in items_held(channel)) < 1900 * 60


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
        assert 0 < client.statistics().packets_queued <= MAX_QUEUED / (1000 + ITEM_OVERHEAD) + 1
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
