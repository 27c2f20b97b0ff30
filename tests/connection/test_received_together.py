"""Channels, answers and requests that are received together, and when their packets leave."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from bokbok_trio import Channel, Connection, RequestHandler, Settings
from bokbok_trio._protocol.coalescing import EARLY_FLUSH_PACKETS, INTERACTIVE_RECEIVES
from bokbok_trio._protocol.packets import MAX_AT_ONCE
from bokbok_trio._stream.socket import SocketStream
from tests.support.channels import assert_nothing_is_left
from tests.support.handlers import in_memory_and_over_sockets, never_waits
from tests.support.helpers import (
    cancel,
    echo,
    open_peer,
    outcomes,
    packet,
    receive_but_credit,
    req,
    settle,
)
from tests.support.inside import check_idle, session_of

# ---- channels ----


@pytest.mark.parametrize("waits_before", [False, True])
@in_memory_and_over_sockets
async def test_items_that_come_together_are_received(waits_before: bool, over_sockets: bool) -> None:
    async def handler(connection: Connection, request: list[bytes], channel: Channel) -> list[bytes]:
        if waits_before:
            await trio.lowlevel.checkpoint()
        return [b"".join([field async for [field] in channel])]

    async with open_peer(channel_handler=handler, over_sockets=over_sockets) as (connection, peer):
        items = [packet(b"item", b"1", body=[field]) for field in (b"a", b"b", b"c")]
        await peer.send(b"chan", b"1", b"", b"", b"", b"0", body=[])
        assert (await peer.receive())[0] == b"credit"
        await peer.stream.send_all(b"".join(items) + packet(b"end", b"1"))
        assert await receive_but_credit(peer) == [b"ok", b"1", b"\x01\0\0\0\x03abc"]
        await settle()
        await settle()
        check_idle(connection)
        assert_nothing_is_left(connection)


@in_memory_and_over_sockets
async def test_items_for_a_channel_that_was_answered_at_once_are_dropped(
    over_sockets: bool,
) -> None:
    async def handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
        """Answer."""

    async with open_peer(channel_handler=handler, over_sockets=over_sockets) as (connection, peer):
        chan = packet(b"chan", b"1", b"", b"", b"", b"0", body=[])
        item = packet(b"item", b"1", body=[b"a"])
        await peer.stream.send_all(chan + packet(b"end", b"1") + cancel(1))
        assert await outcomes(peer, 1) == {1: b"ok"}
        await peer.stream.send_all(item)
        await settle()
        await settle()
        check_idle(connection)
        assert_nothing_is_left(connection)


@in_memory_and_over_sockets
async def test_credit_that_comes_together_with_its_channel_wakes_the_handler_that_waits_for_it(
    over_sockets: bool,
) -> None:
    async def handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
        await channel.send([b"x"])

    async with open_peer(channel_handler=handler, over_sockets=over_sockets) as (connection, peer):
        await peer.stream.send_all(
            packet(b"chan", b"1", b"", b"", b"", b"0", body=[]) + packet(b"credit", b"1", b"100")
        )
        assert (await receive_but_credit(peer))[:2] == [b"item", b"1"]
        assert await outcomes(peer, 1) == {1: b"ok"}
        await settle()
        await settle()
        check_idle(connection)


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_room_that_the_first_wait_of_a_handler_makes_wakes_it_only_when_it_waits(
    is_cancelled: bool,
) -> None:
    """Queued packets leave when the handler waits, since it may wait for just that."""
    filled = 0

    async def handler(connection: Connection, request: list[bytes]) -> None:
        nonlocal filled
        while session_of(connection).flow_control.may_send(0):
            queue = channel.send([bytes(2**12)])
            queue.send(None)  # as if another task had done it in this moment
            queue.close()
            filled += 1
        await channel.send([b"last"])

    async with open_peer(handler, over_sockets=True) as (connection, peer):
        async with connection.open_channel([]) as channel:
            assert (await peer.receive())[0] == b"chan"
            await peer.send(b"credit", b"0", b"%d" % 2**20)
            await settle()
            await peer.stream.send_all(req(1) + cancel(1) * is_cancelled)
            kinds = [(await peer.receive())[0]]
            while kinds[-1] not in (b"ok", b"err"):
                kinds.append((await peer.receive())[0])
            assert kinds == [b"item"] * filled + ([b"err"] if is_cancelled else [b"item", b"ok"])
            await peer.send(b"ok", b"0", body=[])
            with pytest.raises(trio.EndOfChannel):
                await channel.receive()
        await settle()
        await settle()
        check_idle(connection)


# ---- what is sent, and when ----


async def test_whatever_is_received_says_that_the_peer_is_there_whichever_task_reads(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_peer(echo, Settings(ping_after=1, ping_timeout=1)) as (_, peer):
        for n in range(10):
            await trio.sleep(0.5)
            await peer.stream.send_all(req(1 + 2 * n))
            assert (await peer.receive())[0] == b"ok"
        assert await peer.receive() == [b"ping"]
        assert trio.current_time() == 6


def count_sends(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the bytes of each write, for all connections over sockets."""
    sizes: list[int] = []
    send_now = SocketStream.send_nowait

    def spy(stream: SocketStream, data: bytes) -> int:
        sizes.append(len(data))
        return send_now(stream, data)

    monkeypatch.setattr(SocketStream, "send_nowait", spy)
    return sizes


async def test_the_answers_to_what_came_together_leave_together(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(max_requests=1000)
    async with open_peer(never_waits, settings, over_sockets=True) as (_, peer):
        await settle()
        sizes = count_sends(monkeypatch)
        await peer.stream.send_all(b"".join(req(1 + 2 * n) for n in range(EARLY_FLUSH_PACKETS - 1)))
        await outcomes(peer, EARLY_FLUSH_PACKETS - 1)
        assert len(sizes) == 1
        await peer.stream.send_all(b"".join(req(1 + 2 * n) for n in range(2 * EARLY_FLUSH_PACKETS + 1)))
        await outcomes(peer, 2 * EARLY_FLUSH_PACKETS + 1)
        assert len(sizes) == 4  # the first ones of many leave before the last ones are looked at


async def test_what_was_answered_before_a_handler_waits_leaves_then() -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        if request:
            await trio.sleep_forever()

    async with open_peer(handler, over_sockets=True) as (connection, peer):
        await settle()
        await peer.stream.send_all(packet(b"ping") + req(1) + req(3, b"x"))
        assert await peer.receive() == [b"pong"]
        assert await outcomes(peer, 1) == {1: b"ok"}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.request, ["x"])  # and so does everything after that
            assert (await peer.receive())[:2] == [b"req", b"0"]
            await peer.send(b"ok", b"0", body=[])


@pytest.mark.parametrize("handler", [never_waits, echo])
async def test_a_request_is_written_at_once_only_after_a_few_receives_of_one_packet(
    handler: RequestHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does each request of the peer count once, whether its handler waits or not."""
    async with open_peer(handler, over_sockets=True) as (connection, peer):
        sizes = count_sends(monkeypatch)

        async def is_written_at_once() -> bool:
            """Make a request. The peer's answer is a receive of one packet."""
            sizes.clear()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.request, ["x"])
                await settle()
                is_at_once = bool(sizes)
                await peer.send(b"ok", (await peer.receive())[1], body=[])
            await settle()
            return is_at_once

        assert await is_written_at_once()
        for _ in range(2):
            await peer.stream.send_all(req(1) + req(3))
            await outcomes(peer, 2)
            for n in range(INTERACTIVE_RECEIVES - 1):
                await peer.stream.send_all(req(5 + 2 * n))
                await peer.receive()
                await settle()
            assert not await is_written_at_once()
            assert await is_written_at_once()


@in_memory_and_over_sockets
async def test_a_flood_of_requests_leaves_other_tasks_their_turns(over_sockets: bool) -> None:
    since_turn = most = handled = 0

    async def handler(connection: Connection, request: list[bytes]) -> None:
        nonlocal since_turn, most, handled
        handled += 1
        since_turn += 1
        most = max(most, since_turn)

    async def take_turns() -> None:
        nonlocal since_turn
        while True:
            since_turn = 0
            await trio.lowlevel.checkpoint()

    flood = b"".join(req(1 + 2 * n) for n in range(20_000))
    settings = Settings(max_requests=20_000)
    async with open_peer(handler, settings, over_sockets=over_sockets) as (connection, peer):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(take_turns)
            nursery.start_soon(peer.stream.send_all, flood)
            await outcomes(peer, 20_000)
            nursery.cancel_scope.cancel()
        await settle()
        await settle()
        check_idle(connection)
    assert handled == 20_000
    # In each turn of the event loop what is decoded at once; its order may change between two turns.
    assert most <= 2 * (MAX_AT_ONCE + 1)
