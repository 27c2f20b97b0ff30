"""Reconnecting connections: when they dial, and where."""

from __future__ import annotations

from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
import trio
import trio.testing

from bokbok_trio import (
    Channel,
    Connection,
    ConnectionLost,
    Key,
    RemoteError,
    Settings,
    UnixAddress,
    open_reconnecting,
    open_server,
    serve,
)
from bokbok_trio._backoff import MAX_BACKOFF, MIN_BACKOFF

from ..support.helpers import RawPeer, busy_handler, echo, settle
from ..support.network import A, B, C, Network, count_items, drop

KEY = Key(bytes(range(32)))


# ---- when it tries where ----


async def test_waits_are_random_between_half_of_a_limit_and_all_of_it(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Network()
    monkeypatch.setattr("bokbok_trio._client.dial", network.dial)
    with trio.move_on_after(40_000):
        async with open_reconnecting(A):
            raise AssertionError
    gaps = [later - sooner for sooner, later in pairwise(network.times)]
    limits = [min(2 * MIN_BACKOFF * 2**at, MAX_BACKOFF) for at in range(20)]
    assert all(limit * 0.499 < gap < limit * 1.001 for gap, limit in zip(gaps, limits, strict=False))
    late = gaps[9:]
    assert len(late) > 1000
    assert MAX_BACKOFF * 0.499 < min(late) < MAX_BACKOFF * 0.55
    assert MAX_BACKOFF * 0.95 < max(late) < MAX_BACKOFF * 1.001


async def test_waits_double_to_a_limit_and_never_overflow(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    with trio.move_on_after(40_000):
        async with open_reconnecting(A):
            raise AssertionError
    gaps = [round(later - sooner, 6) for sooner, later in zip(network.times, network.times[1:], strict=False)]
    assert gaps[:9] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30]
    assert set(gaps[9:]) == {MAX_BACKOFF}
    assert len(gaps) > 1100  # 2.0 ** 1100 is too much for a float


async def test_a_handshake_that_broke_off_makes_one_wait_longer_and_none_after_it(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    """By a bad link, or as the server was killed: then it is back sooner than one that has no room."""
    listener = network.listen()

    async def break_off() -> None:
        for _ in range(2):
            await trio.aclose_forcefully(await listener.accept())
        del network.listeners[A]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(break_off)
        with trio.move_on_after(7):
            async with open_reconnecting(A):
                raise AssertionError
    assert network.times == [0, 2, 4, 4.8, 6.4]


async def test_several_addresses_are_tried_in_turn_and_then_waited_for(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    with trio.move_on_after(1):
        async with open_reconnecting([A, B, C]):
            raise AssertionError
    assert network.where == [A, B, C] * 3
    assert network.times == [0] * 3 + [0.2] * 3 + [0.6] * 3


async def test_a_connection_that_answered_is_followed_at_once_by_the_next_address(
    network: Network, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with network.server(address=A) as a, network.server(address=B):
        async with open_reconnecting([A, B, C]) as client:
            await client.request(["ping", "x"])
            await trio.sleep(1)
            await drop(a)
            assert network.dialled == [(0, A), (1, B)]
            assert client.connection
            assert "done with the connection with 127.0.0.1:1: the peer closed" in caplog.text
            with pytest.raises(RemoteError):
                await client.request(["what?"])
            await trio.sleep(1)
            await network.cut()
            await client.request(["ping", "x"], idempotent=True)
            assert network.dialled[2:] == [(2, C), (2, A)]


async def test_a_connection_that_answered_begins_a_new_round(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with network.server(address=B) as server, open_reconnecting([A, B]) as client:
        await client.request(["ping", "x"])
        await trio.sleep(1)
        await drop(server)
        assert network.dialled == [(0, A), (0, B), (1, A), (1, B)]
        assert client.connection


async def test_a_connection_that_answered_or_lasted_resets_the_waits(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with network.server() as server, open_reconnecting(A) as client:
        for lasts, answers, wait in [
            *((1, False, 0.2), (1, False, 0.4), (9, False, 0.8), (1, True, 0)),
            *((1, False, 0.2), (1, False, 0.4), (0.02, True, 0.09), (10, False, 0)),
        ]:
            opened = trio.current_time()
            if answers:
                await client.request(["ping", "x"])
            await trio.sleep(lasts)
            await drop(server)
            await trio.sleep(wait)
            await settle()
            assert network.times[-1] == pytest.approx(opened + lasts + wait, abs=0.011)
        assert len(network.times) == 9


@pytest.mark.parametrize("what", ["request", "item"])
async def test_one_whose_peer_only_asks_or_sends_items_has_worked(
    network: Network, what: str, autojump_clock: trio.testing.MockClock
) -> None:
    """A client that serves, or that reads one long stream, makes no request that is answered."""

    async def stream(connection: Connection, request: list[bytes], channel: Channel) -> None:
        await channel.send(["news"])
        await trio.sleep_forever()

    async with (
        network.server(channel_handler=stream) as server,
        open_reconnecting(A, request_handler=echo) as client,
    ):
        for _ in range(10):
            dialled = network.times[-1]
            with suppress(ConnectionLost):
                async with client.open_channel(["follow"]) as channel:
                    if what == "item":
                        assert await channel.receive() == [b"news"]
                    else:
                        for connection in server.connections:
                            await connection.request(["back", "1"])
                    await trio.sleep(1)
                    await drop(server)
                    await settle()
            await settle()
            assert network.times[-1] == pytest.approx(dialled + 1, abs=0.011)


async def test_an_answered_ping_is_an_answer(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    async with network.server() as server, open_reconnecting(A, settings=Settings(ping_after=5)):
        await trio.sleep(7)
        await drop(server)
        assert network.times == [0, 7]


@pytest.mark.parametrize("answered", [True, False])
async def test_an_answered_channel_is_an_answer(
    network: Network, answered: bool, autojump_clock: trio.testing.MockClock
) -> None:
    async with network.server(channel_handler=count_items) as server, open_reconnecting(A) as client:
        async with client.open_channel(["count"]) as channel:
            if answered:
                await channel.end()
                await channel.answer()
        await trio.sleep(1)
        await drop(server)
        await trio.sleep(0.1)
        assert network.times == ([0, 1] if answered else [0])


async def test_a_peer_that_accepts_and_drops_is_not_dialled_in_a_loop(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    listener = network.listen()

    async def accept_and_drop() -> None:
        while True:
            peer = RawPeer(await listener.accept())
            await peer.shake_hands()
            await peer.stream.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(accept_and_drop)
        async with open_reconnecting([A, B]):
            await trio.sleep(100)
        nursery.cancel_scope.cancel()
    assert network.where[:6] == [A, B, A, B, A, B]
    assert network.times[::2] == pytest.approx([0, 0.2, 0.6, 1.4, 3, 6.2, 12.6, 25.4, 51, 81])


# ---- on real sockets ----


async def test_a_server_that_restarts_is_found_again(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    answers: list[list[bytes]] = []
    async with trio.open_nursery() as nursery:
        server = await nursery.start(serve, path, busy_handler)
        with trio.fail_after(30):
            async with open_reconnecting(path) as client:
                assert client.connection
                assert client.connection.address == UnixAddress(path)
                assert await client.request(["ping", "1"]) == [b"pong", b"1"]
                server.stop(grace=0)
                await server.wait_stopped()
                while client.connection is not None:
                    await trio.lowlevel.checkpoint()

                async def ask() -> None:
                    answers.append(await client.request(["ping", "2"]))

                async with trio.open_nursery() as askers:
                    askers.start_soon(ask)
                    await settle()
                    server = await nursery.start(serve, path, busy_handler)
                    assert await client.request(["ping", "3"]) == [b"pong", b"3"]
        server.stop()
    assert answers == [[b"pong", b"2"]]


async def test_the_second_of_two_servers_is_found(caplog: pytest.LogCaptureFixture) -> None:
    async with open_server("127.0.0.1:0", busy_handler, user_key={"u": KEY}) as server:
        with trio.fail_after(30):
            async with open_reconnecting(
                ["/nonexistent/socket", server.addresses[0]], user="u", key=KEY
            ) as client:
                assert await client.request(["ping", "x"]) == [b"pong", b"x"]
    assert "no connection with /nonexistent/socket: FileNotFoundError" in caplog.text
