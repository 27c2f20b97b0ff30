"""Connections that are lost: by the peer, by the transport, by a peer that lies."""

from __future__ import annotations

import logging

import pytest
import trio
import trio.testing

from bokbok_trio import Connection, ConnectionLost, Settings
from bokbok_trio._connection.ending import CLOSE_TIMEOUT
from bokbok_trio.testing import FaultyStream, open_connection_pair
from tests.support.connections import faulty, ignore_any_loss, ignore_loss, start_waiting
from tests.support.helpers import busy_handler, echo, packet, raw_peer, settle
from tests.support.inside import break_transport


async def test_losing_the_peer_raises_nothing_by_itself(sealed: bool) -> None:
    closed: list[Connection] = []

    async def on_close(connection: Connection) -> None:
        await trio.lowlevel.checkpoint()
        closed.append(connection)

    async with open_connection_pair(sealed=sealed, client_close_handler=on_close) as (client, server):
        await break_transport(server)
        await client.wait_closed()
        assert closed == [client]
        assert client.closed
    assert closed == [client]


@pytest.mark.parametrize("how", ["sending", "receiving", "oddly"])
async def test_a_broken_transport_fails_the_waiters(
    how: str, sealed: bool, autojump_clock: trio.testing.MockClock
) -> None:
    caught: list[BaseException] = []
    streams: list[FaultyStream] = []
    async with (
        open_connection_pair(server_handler=busy_handler, sealed=sealed, wrap=faulty(streams)) as (
            client,
            server,
        ),
        trio.open_nursery() as nursery,
    ):
        await start_waiting(nursery, client, caught)
        if how == "receiving":
            streams[0].receiving.alter = lambda data: bytes(65) if sealed else b"\xff" * 5
            nursery.start_soon(ignore_any_loss, server)
        elif how == "oddly":
            streams[0].receiving.alter = odd_failure
            nursery.start_soon(ignore_any_loss, server)
        else:
            await streams[0].cut()
            nursery.start_soon(ignore_any_loss, client)
    assert [type(exc) for exc in caught] == [ConnectionLost]


def odd_failure(data: bytes) -> bytes:
    raise OSError("odd")


async def test_answers_that_came_before_sending_broke_are_delivered() -> None:
    """The peer answered and closed; our next send breaks before we have read the answer."""
    async with raw_peer() as (connection, peer):
        answers: list[list[bytes]] = []

        async def ask() -> None:
            answers.append(await connection.request(["first"]))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            assert (await peer.receive())[0] == b"req"
            # All at once: the answer and the end are on their way, and our sending side is broken.
            await peer.send(b"ok", b"0", body=[b"in time"])
            await peer.stream.aclose()
            nursery.start_soon(ignore_loss, connection)
        assert answers == [[b"in time"]]


async def test_when_only_sending_is_broken_the_connection_ends_soon(
    autojump_clock: trio.testing.MockClock,
) -> None:
    streams: list[FaultyStream] = []

    def break_it(data: bytes) -> bytes:
        raise trio.BrokenResourceError("cable")

    async with open_connection_pair(wrap=faulty(streams)) as (connection, _):
        streams[0].sending.alter = break_it
        with pytest.raises(ConnectionLost, match=r"sending failed.*cable") as caught:
            await connection.request([])
        assert caught.value.may_have_run, "how much of it left is not known"
        assert trio.current_time() == CLOSE_TIMEOUT


async def test_a_request_that_nobody_saw_says_so(autojump_clock: trio.testing.MockClock) -> None:
    async with raw_peer(max_requests=1) as (connection, peer):
        caught: list[BaseException] = []
        async with trio.open_nursery() as nursery:
            await start_waiting(nursery, connection, caught)
            await start_waiting(nursery, connection, caught)  # waits for a slot
            await peer.stream.aclose()
        assert sorted(getattr(exc, "may_have_run", None) or False for exc in caught) == [False, True]


async def test_a_request_answered_as_closing_did_not_run() -> None:
    async with raw_peer() as (connection, peer), trio.open_nursery() as nursery:
        caught: list[BaseException] = []
        await start_waiting(nursery, connection, caught)
        await peer.receive()
        await peer.send(b"err", b"0", b"closing", b"going away", b"")
        await settle()
        [exc] = caught
        assert isinstance(exc, ConnectionLost)
        assert (exc.reason, exc.may_have_run) == ("going away", False)
        assert not connection.closed


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (packet(b"nonsense"), "the peer broke the protocol: unknown packet"),
        (packet(b"ok", b"0", body=[]), "the peer broke the protocol: an answer to 0"),
        (b"\xff\xff\xff\xff", "the peer broke the protocol: a packet of 4294967295 bytes"),
        (b"HTTP/1.1 400 Bad Request", "the peer broke the protocol: a packet of 1213486160 bytes"),
    ],
)
async def test_a_peer_that_lies_ends_its_own_connection_only(
    data: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with raw_peer(echo) as (connection, peer), raw_peer(echo) as (_, other):
        await peer.stream.send_all(data)
        kind, code, text = await peer.receive()
        assert (kind, code) == (b"abort", b"protocol")
        assert text.decode().startswith(reason.removeprefix("the peer broke the protocol: "))
        assert await peer.stream.receive_some() == b""
        await peer.stream.aclose()
        await connection.wait_closed()
        with pytest.raises(ConnectionLost) as caught:
            await connection.request([])
        assert caught.value.reason.startswith(reason)
        assert connection.reason == caught.value.reason
        await other.send(b"req", b"1", b"", b"", b"", body=[b"alive?"])
        assert await other.receive() == [b"ok", b"1", b"\x01\x00\x00\x00\x06alive?"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert reason in caplog.text


async def test_a_packet_cut_short_is_told() -> None:
    async with raw_peer(echo) as (connection, peer):
        await peer.stream.send_all(packet(b"req", b"1", b"", b"", b"", body=[])[:-1])
        await peer.stream.aclose()
        await connection.wait_closed()
        with pytest.raises(ConnectionLost, match="the peer cut a packet short"):
            await connection.request([])


async def test_a_flood_of_requests_and_cancels_is_handled_within_the_slots(
    autojump_clock: trio.testing.MockClock,
) -> None:
    started: list[bytes] = []

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        started.append(request[0])
        await trio.sleep_forever()
        raise AssertionError

    async with raw_peer(handler, Settings(max_requests=5)) as (connection, peer):
        for n in range(1, 11, 2):
            await peer.send(b"req", b"%d" % n, b"", b"", b"", body=[b"%d" % n])
        for n in range(1, 7, 2):
            await peer.send(b"cancel", b"%d" % n)
            await peer.send(b"cancel", b"%d" % n)
        answers = sorted([await peer.receive() for _ in range(3)])
        assert [fields[:3] for fields in answers] == [[b"err", b"%d" % n, b"cancelled"] for n in (1, 3, 5)]
        assert connection.statistics().handlers_running == 2
        for n in range(11, 19, 2):
            await peer.send(b"req", b"%d" % n, b"", b"", b"", body=[b"x"])
        await connection.wait_closed()
        with pytest.raises(ConnectionLost, match="more than 5 requests of depth 0 in flight"):
            await connection.request([])
