"""Requests between the package and the second implementation, which are connected."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from bokbok_trio import (
    Connection,
    ConnectionLost,
    RemoteError,
    RequestError,
    Settings,
    current_request,
    open_connection,
    open_server,
)
from bokbok_trio.testing import MemoryListener
from tests.support.second_peer import KEY, SECRET, Peer, both_roles, connected, double

from ..support import second_implementation as second
from ..support.vectors import both_modes


@both_modes
async def test_the_second_implementation_as_client(mode: str, autojump_clock: trio.testing.MockClock) -> None:
    sealed = mode == "sealed"
    key = KEY.raw if sealed else b""
    client = second.Client(b"zo" if sealed else b"", key, b"maps" if sealed else b"", (4096, 1), SECRET)
    listener = MemoryListener()
    settings = Settings(max_message_size=5000, max_requests=2)
    lost = []

    async def on_close(connection: Connection) -> None:
        with pytest.raises(ConnectionLost, match="the peer closed the connection") as caught:
            await connection.request([])
        lost.append((connection.user, connection.encrypted, caught.value.may_have_run))

    async with open_server(
        [listener],
        double,
        user_key={"zo": KEY} if sealed else None,
        service="maps" if sealed else "",
        close_handler=on_close,
        settings=settings,
    ):
        with trio.fail_after(5):
            peer = Peer(listener.connect(), client)
            await peer.shake_hands()
            assert client.peer_limits == (5000, 2)
            await peer.talk(b"60000000")
            await peer.end()
    assert lost == [("zo" if sealed else None, sealed, False)]


@both_modes
async def test_the_second_implementation_as_server(mode: str, autojump_clock: trio.testing.MockClock) -> None:
    sealed = mode == "sealed"
    keys = {b"zo": KEY.raw} if sealed else None
    server = second.Server(keys, b"maps" if sealed else b"", (4096, 1), SECRET)
    ours, theirs = trio.testing.memory_stream_pair()
    peer = Peer(theirs, server)
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.shake_hands)
            async with open_connection(
                ours,
                user="zo" if sealed else None,
                key=KEY if sealed else None,
                service="maps" if sealed else "",
                request_handler=double,
                settings=Settings(max_message_size=5000, max_requests=2),
            ) as connection:
                assert connection.encrypted is sealed
                assert server.peer_limits == (5000, 2)
                await peer.talk(b"5000000")
        await peer.expect_end()


@both_roles
async def test_an_echo_of_300_kib(role: str, autojump_clock: trio.testing.MockClock) -> None:
    text = bytes(range(256)) * 1200
    async with connected(role) as (connection, peer):
        own, other = peer.ids
        with trio.fail_after(5):
            await peer.put(b"req", own, b"", b"", b"", second.body([text, b"1"]))
            assert await peer.take() == [b"ok", own, second.body([text, b"1"])]
        assert peer.seen == [b"part"] * len(peer.seen)
        assert len(peer.seen) >= 5

        async def answer() -> None:
            _, id, *_, body = await peer.take()
            assert id == other
            await peer.put(b"ok", id, body)

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(answer)
                assert await connection.request([text, b"2"]) == [text, b"2"]


@both_roles
async def test_a_deadline_is_seen_by_the_second_implementation(
    role: str, autojump_clock: trio.testing.MockClock
) -> None:
    async with connected(role) as (connection, peer):
        _, id = peer.ids

        async def ask() -> None:
            with trio.move_on_after(1.5) as scope:
                await connection.request([b"too long"])
            assert scope.cancelled_caught
            assert await connection.request([b"for ever"]) == []

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            _, _, timeout, _, _, body = await peer.take()
            assert (timeout, second.unpack_body(body)) == (b"1500000", [b"too long"])
            # So near its own deadline the package waits for that, and its user sees it alone.
            await trio.sleep(1.46)
            await peer.put(b"err", id, b"timeout", b"", b"")
            _, id, timeout, _, _, body = await peer.take()
            assert (timeout, second.unpack_body(body)) == (b"", [b"for ever"])
            await peer.put(b"ok", id, second.body([]))
            assert trio.current_time() == 1.5


@both_roles
async def test_a_deadline_of_the_second_implementation(
    role: str, autojump_clock: trio.testing.MockClock
) -> None:
    async def sleep(connection: Connection, request: list[bytes]) -> None:
        await trio.sleep_forever()

    async with connected(role, sleep) as (_, peer):
        own, _ = peer.ids
        await peer.put(b"req", own, b"2500000", b"", b"", second.body([]))
        assert (await peer.take())[:3] == [b"err", own, b"timeout"]
        assert trio.current_time() == 2.5


@both_roles
async def test_a_timeout_that_the_second_implementation_means_as_a_code(
    role: str, autojump_clock: trio.testing.MockClock
) -> None:
    """Far from the deadline it can only be the handler's own."""
    async with connected(role) as (connection, peer):

        async def answer() -> None:
            _, id, *_ = await peer.take()
            await peer.put(b"err", id, b"timeout", b"of my own", b"")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer)
            with trio.fail_after(1.5), pytest.raises(RemoteError, match="of my own") as caught:
                await connection.request([])
            assert caught.value.code == "timeout"
        assert trio.current_time() == 0


@both_roles
async def test_depth_context_and_details_cross_both_ways(
    role: str, autojump_clock: trio.testing.MockClock
) -> None:
    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        context = current_request().context
        with pytest.raises(RemoteError, match="too far") as caught:
            await connection.request([b"deeper"], context={"copied": context["trace-id"]})
        raise RequestError("no", code="no-way", details=caught.value.details * 2)

    context = second.flat({b"trace-id": b"\0\xff"})
    async with connected(role, handler) as (_, peer):
        own, other = peer.ids
        with trio.fail_after(5):
            await peer.put(b"req", own, b"", b"7", context, second.body([b"deep"]))
            copied = second.flat({b"copied": b"\0\xff"})
            assert await peer.take() == [b"req", other, b"", b"8", copied, second.body([b"deeper"])]
            await peer.put(b"err", other, b"too-far", b"too far", b"\1\2")
            assert await peer.take() == [b"err", own, b"no-way", b"no", b"\1\2\1\2"]


@both_roles
async def test_the_second_implementation_is_told_what_it_did_wrong(
    role: str, autojump_clock: trio.testing.MockClock
) -> None:
    async with connected(role) as (connection, peer):
        with trio.fail_after(5):
            await peer.send(second.packet([b"hello"]))
            kind, code, message = await peer.take()
            assert (kind, code) == (b"abort", b"protocol")
            assert b"hello" in message
            await peer.expect_end()
            await connection.wait_closed()


@both_roles
async def test_an_abort_of_the_second_implementation(
    role: str, autojump_clock: trio.testing.MockClock
) -> None:
    async with connected(role) as (connection, peer):
        with trio.fail_after(5):
            for packet in peer.open.abort(second.Bad("so many mistakes")):
                await peer.send(packet)
            await connection.wait_closed()
            with pytest.raises(ConnectionLost, match="so many mistakes"):
                await connection.request([])
            rest = b""
            while more := await peer.stream.receive_some():
                rest += more
            assert not rest or peer.opener.open(rest) == b"", "an abort is not answered by another"


@both_roles
async def test_pings_of_both_sides(role: str, autojump_clock: trio.testing.MockClock) -> None:
    settings = Settings(max_message_size=2**20, ping_after=3, ping_timeout=1)
    async with connected(role, settings=settings) as (connection, peer):
        with trio.move_on_after(10):
            await peer.take()
        assert peer.seen == [b"ping"] * 3
        assert not connection.closed
        await peer.put(b"ping")
        await peer.take_word(b"pong")
        await peer.take_word(b"ping")
        with trio.fail_after(5):
            await connection.wait_closed()  # as the peer is silent from here on
        assert trio.current_time() == 17


async def test_the_second_implementation_as_client_with_another_key(
    autojump_clock: trio.testing.MockClock,
) -> None:
    client = second.Client(b"zo", bytes(32), b"", (4096, 1), SECRET)
    listener = MemoryListener()
    async with open_server([listener], user_key={"zo": KEY}):
        peer = Peer(listener.connect(), client)
        with trio.fail_after(5), pytest.raises(second.NotAuthentic, match="refused"):
            await peer.shake_hands()
        assert await peer.stream.receive_some() == b""
