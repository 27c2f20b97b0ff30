"""Channels with a peer made by hand."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from bokbok_trio import Channel, Connection, ConnectionLost
from bokbok_trio._protocol.flow_control import ITEM_COST, WINDOW
from tests.support.channels import assert_nothing_is_left, echo_items, receive_chan
from tests.support.helpers import packet, raw_peer, settle
from tests.support.inside import items_held


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
        assert connection.statistics().packets_queued == 1
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
        assert sum(map(len, items_held(channel))) < WINDOW + 2**16
