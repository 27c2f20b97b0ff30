"""How connections end: late answers, the wait for the peer's end, and the log."""

from __future__ import annotations

import gc
import itertools
import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import pytest
import trio
import trio.abc
import trio.testing
from trio.testing import MockClock

from bokbok_trio import Connection, ConnectionClosed, ConnectionLost
from bokbok_trio._stream.fast import FastStream
from bokbok_trio._stream.secretbox import SecretboxStream
from bokbok_trio.testing import open_connection_pair
from tests.support.helpers import packet, raw_peer, settle
from tests.support.inside import break_transport
from tests.support.pairs import open_pair

over_all_ends = pytest.mark.parametrize(
    "end",
    [
        pytest.param(packet(b"abort", b"protocol", b"why"), id="abort"),
        pytest.param(packet(b"nonsense"), id="nonsense"),
        pytest.param(b"", id="end"),
    ],
)


@pytest.fixture
def always_acknowledging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the peer's system acknowledge a byte each time that it is asked, of very many."""
    counts = itertools.count(10**6, -1)
    monkeypatch.setattr(FastStream, "count_unacknowledged", lambda _: next(counts))


# ---- what still counts ----


@over_all_ends
async def test_an_answer_that_comes_with_the_end_counts(end: bytes, autojump_clock: MockClock) -> None:
    async with raw_peer() as (connection, peer), trio.open_nursery() as nursery:
        answers: list[list[bytes]] = []

        @nursery.start_soon
        async def ask() -> None:
            answers.append(await connection.request([]))

        await peer.receive()
        await peer.stream.send_all(packet(b"ok", b"0", body=[b"x"]) + end)
        await peer.stream.aclose()
        await connection.wait_closed()
        await settle()
        assert answers == [[b"x"]]


@over_all_ends
async def test_a_pong_that_comes_with_the_end_counts(end: bytes, autojump_clock: MockClock) -> None:
    async with raw_peer() as (connection, peer), trio.open_nursery() as nursery:
        times: list[float | ConnectionLost] = []

        @nursery.start_soon
        async def ping() -> None:
            try:
                times.append(await connection.ping())
            except ConnectionLost as exc:
                times.append(exc)

        assert await peer.receive() == [b"ping"]
        await trio.sleep(0.5)
        await peer.stream.send_all(packet(b"pong") + end)
        await peer.stream.aclose()
        await connection.wait_closed()
        await settle()
        assert times == [0.5]


async def test_whoever_waits_for_the_next_ping_waits_for_one_pong_only(autojump_clock: MockClock) -> None:
    async with raw_peer() as (connection, peer), trio.open_nursery() as nursery:
        nursery.start_soon(connection.ping)
        assert await peer.receive() == [b"ping"]
        nursery.start_soon(connection.ping)
        await settle()
        await peer.send(b"pong")
        assert await peer.receive() == [b"ping"]
        assert trio.current_time() == 0, "no silence is waited for"
        await peer.send(b"pong")


@pytest.mark.parametrize("by_peer", [False, True])
async def test_draining_is_set_where_it_is_first_asked_for_after_the_end(
    by_peer: bool, autojump_clock: MockClock
) -> None:
    async with raw_peer() as (connection, peer):
        if by_peer:
            await peer.stream.aclose()
            await connection.wait_closed()
        else:
            await connection.aclose()
        assert connection.draining.is_set()


# ---- for how long the end is waited for ----


@pytest.mark.usefixtures("always_acknowledging")
async def test_a_closed_connection_waits_a_second_whatever_is_acknowledged(autojump_clock: MockClock) -> None:
    async with raw_peer() as (connection, _):
        await connection.aclose()
        await connection.wait_closed()
        assert trio.current_time() == 1


@pytest.mark.usefixtures("always_acknowledging")
async def test_a_drained_connection_that_is_closed_waits_for_another_second_at_most(
    autojump_clock: MockClock,
) -> None:
    async with raw_peer() as (connection, peer):
        connection.drain()
        assert await peer.receive() == [b"bye"]
        await peer.send(b"bye-ok")
        await trio.sleep(5.25)
        with trio.move_on_after(20):
            await connection.aclose()
        assert 5.25 < trio.current_time() <= 6.25


# ---- what is logged ----


@pytest.mark.parametrize("is_closed", [False, True])
async def test_a_stream_that_fails_oddly_is_logged_unless_it_is_over(
    is_closed: bool, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    class Odd(trio.abc.Stream):
        def __init__(self, stream: trio.abc.Stream) -> None:
            self.stream = stream
            self.may_fail: trio.Event | None = None

        async def send_all(self, data: bytes | bytearray | memoryview) -> None:
            if self.may_fail is not None:
                await self.may_fail.wait()
                raise ZeroDivisionError("odd")
            await self.stream.send_all(data)

        async def wait_send_all_might_not_block(self) -> None:
            await self.stream.wait_send_all_might_not_block()

        async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
            return await self.stream.receive_some(max_bytes)

        async def aclose(self) -> None:
            await self.stream.aclose()

    streams: list[Odd] = []

    def wrap(stream: trio.abc.Stream) -> Any:
        streams.append(Odd(stream))
        return streams[-1]

    async def ask(connection: Connection) -> None:
        with pytest.raises(ConnectionClosed if is_closed else ConnectionLost):
            await connection.request([])

    async with (
        open_connection_pair(sealed=False, wrap=wrap) as (client, _),
        trio.open_nursery() as nursery,
    ):
        await settle()
        streams[0].may_fail = trio.Event()
        nursery.start_soon(ask, client)
        await settle()
        if is_closed:
            nursery.start_soon(client.aclose)
            await settle()
        streams[0].may_fail.set()
        await client.wait_closed()
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert ["streams do not raise" in record.message for record in errors] == ([] if is_closed else [True])


# ---- what is left ----


@pytest.mark.parametrize("is_lost", [False, True])
@pytest.mark.parametrize("opened", [open_connection_pair, partial(open_pair, "tcp sealed")])
async def test_a_connection_that_is_kept_has_no_keys_any_more(
    opened: Callable[[], AbstractAsyncContextManager[tuple[Connection, Connection]]],
    is_lost: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys: list[bytes] = []
    rekey = SecretboxStream.rekey

    def spy(stream: SecretboxStream, *, send_key: bytes, receive_key: bytes) -> None:
        keys.extend((send_key, receive_key))
        rekey(stream, send_key=send_key, receive_key=receive_key)

    def owners() -> list[object]:
        return [owner for key in keys for owner in gc.get_referrers(key) if owner is not keys]

    monkeypatch.setattr(SecretboxStream, "rekey", spy)
    async with opened() as (client, server):
        await client.ping()
        assert len(keys) == 4
        assert len(owners()) >= 4
        if is_lost:
            await break_transport(client)
        else:
            await client.aclose()
        for connection in (client, server):
            await connection.wait_closed()
        await settle()
        assert owners() == []
        assert client.closed
        assert server.closed
        assert client.key_fingerprint == server.key_fingerprint is not None
