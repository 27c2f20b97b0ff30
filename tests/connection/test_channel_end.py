"""How channels end: by leaving, by deadlines, and with their connection."""

from __future__ import annotations

import math
from contextlib import suppress

import pytest
import trio
from trio.testing import MockClock

from bokbok_trio import (
    Channel,
    Connection,
    ConnectionClosed,
    ConnectionLost,
    RemoteError,
    RequestError,
    open_connection,
    open_server,
)
from bokbok_trio.testing import MemoryListener, open_connection_pair
from tests.support.channels import Handler, assert_nothing_is_left, fill, open_pair, receive_chan
from tests.support.connections import check_nothing_in_flight
from tests.support.helpers import packet, raw_peer, settle

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
    is_open = trio.Event()
    started: list[list[bytes]] = []

    async def open_handler(connection: Connection) -> None:
        await is_open.wait()

    async def channel_handler(connection: Connection, request: list[bytes], channel: Channel) -> None:
        started.append(request)

    listener = MemoryListener()
    async with (
        open_server([listener], channel_handler=channel_handler, open_handler=open_handler) as server,
        open_connection(listener.connect()) as client,
    ):
        async with client.open_channel(["left early"]) as channel:
            await channel.send(["x"])
            await settle()
        await settle()
        [connection] = server.connections
        check_nothing_in_flight(client, connection)
        is_open.set()
        await settle()
        assert_nothing_is_left(client, connection)
    assert started == []
