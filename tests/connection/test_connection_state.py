"""The state of a connection, pings, its end, and defects of this package."""

from __future__ import annotations

import contextvars
import logging
from collections.abc import Generator
from types import coroutine
from typing import Any

import pytest
import trio
import trio.testing

from bokbok_trio import (
    Connection,
    ConnectionClosed,
    ConnectionLost,
    current_request,
)
from bokbok_trio._connection.eager import start_eagerly
from bokbok_trio._protocol.events import Answer
from bokbok_trio._protocol.session import Session
from bokbok_trio._stream.fast import FastStream
from bokbok_trio._trio_util import bare_nursery
from bokbok_trio.testing import open_connection_pair
from tests.support.helpers import (
    WholeStream,
    echo,
    open_peer,
    outcomes,
    packet,
    raw_peer,
    req,
    settle,
)
from tests.support.inside import check_idle
from tests.support.tasks import count_reading_tasks

# ---- pings ----


async def test_a_ping_tells_the_round_trip(autojump_clock: trio.testing.MockClock) -> None:
    async with raw_peer() as (connection, peer), trio.open_nursery() as nursery:
        times: list[float] = []

        async def ping() -> None:
            times.append(await connection.ping())

        nursery.start_soon(ping)
        assert await peer.receive() == [b"ping"]
        await trio.sleep(0.5)
        for _ in range(3):
            nursery.start_soon(ping)  # one is out, so these wait for the next
        await settle()
        await trio.sleep(0.25)
        await peer.send(b"pong")
        assert await peer.receive() == [b"ping"]
        assert times == [0.75]
        await trio.sleep(0.125)
        await peer.send(b"pong")
        await settle()
        assert times == [0.75, 0.125, 0.125, 0.125]
        await peer.send(b"pong")  # of no ping
        await settle()
        assert not connection.closed


async def test_a_ping_is_cancelled_as_the_connection_is_closed() -> None:
    async with raw_peer() as (connection, _), trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        @nursery.start_soon
        async def ping() -> None:
            with scope:
                await connection.ping()

        await settle()
        scope.cancel()
        await connection.aclose()
        assert scope.cancelled_caught


async def test_a_ping_of_a_connection_that_ends_or_has_ended_fails(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with raw_peer() as (connection, _), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def ping() -> None:
            with pytest.raises(ConnectionClosed):
                await connection.ping()

        await settle()
        await connection.aclose()
        with pytest.raises(ConnectionClosed, match="this side closed the connection"):
            await connection.ping()
        assert connection.reason == "this side closed the connection"


# ---- its end ----


async def test_a_drained_connection_waits_on_while_the_peer_acknowledges_something(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([100, 50, 50, 50])
    monkeypatch.setattr(FastStream, "count_unacknowledged", lambda _: next(counts))
    async with raw_peer() as (connection, peer):
        connection.drain()
        assert await peer.receive() == [b"bye"]
        await peer.send(b"bye-ok")
        await connection.wait_closed()
        assert trio.current_time() == 2, "a second after the last time that something was"


async def test_a_stream_that_cannot_say_its_end_is_closed_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with open_connection_pair(sealed=False, wrap=WholeStream) as (client, server):
        await client.aclose()
        await server.wait_closed()
        assert trio.current_time() == 0


async def test_a_follower_is_cancelled_with_what_is_around_the_connection() -> None:
    with trio.CancelScope() as scope:
        async with open_connection_pair(server_handler=echo, client_handler=echo) as (_, server):
            assert await server.request(["x"]) == [b"x"]
            await settle()
            assert count_reading_tasks() == 3, "the client's second one waits for its turn"
            scope.cancel()
    assert scope.cancelled_caught


async def test_an_abort_of_the_peer_is_told_and_not_answered(caplog: pytest.LogCaptureFixture) -> None:
    async with raw_peer() as (connection, peer):
        await peer.send(b"abort", b"protocol", b"bad\nid")
        assert await peer.stream.receive_some() == b""
        await connection.wait_closed()
        with pytest.raises(
            ConnectionLost, match=r"the peer says that this side broke the protocol: bad\\nid"
        ):
            await connection.request([])
    assert "bad\\nid" in caplog.text


async def test_draining_shows_on_both_sides_and_so_does_the_end() -> None:
    async with open_connection_pair(echo, echo) as (client, server):
        before = client.draining
        assert not before.is_set()
        server.drain()
        await before.wait()
        assert server.draining.is_set()
        await client.wait_closed()
        assert client.draining is before
    async with open_connection_pair() as (client, server):
        before = client.draining
        await client.aclose()
        assert before.is_set()


# ---- what crosses ----


@pytest.mark.parametrize("is_good", [True, False])
async def test_the_answer_to_a_request_that_was_cancelled_meanwhile_is_dropped(is_good: bool) -> None:
    """A request arrives with the answer. Its handler cancels the asker before the answer is dispatched."""
    scope = trio.CancelScope()

    async def ask(connection: Connection) -> None:
        with scope:
            await connection.request([])

    async def handler(connection: Connection, request: list[bytes]) -> None:
        scope.cancel()
        await trio.lowlevel.checkpoint()

    async with raw_peer(handler) as (connection, peer):
        for n in range(20):  # Trio draws lots whether the asker goes on before the answer is dispatched
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, connection)
                id = (await peer.receive())[1]
                answer = packet(b"ok", id, body=[]) if is_good else packet(b"err", id, b"no", b"no", b"")
                await peer.stream.send_all(req(1 + 2 * n) + answer)
                assert await outcomes(peer, 1) == {1 + 2 * n: b"ok"}
            assert scope.cancelled_caught
            scope = trio.CancelScope()
        check_idle(connection)


def test_a_request_that_was_answered_is_cancelled_to_no_effect() -> None:
    client = Session("client", max_message_size=4096, max_requests=1, slots=1)
    client.request([])
    client.take(0)
    assert client.receive(packet(b"ok", b"0", body=[])) == [Answer(0, [])]
    client.cancel(0)
    assert client.take(0) == b""


# ---- requests that are handled ----


async def test_the_current_request_names_itself_and_is_none_elsewhere() -> None:
    seen: list[str] = []

    async def handler(connection: Connection, request: list[bytes]) -> None:
        seen.append(repr(current_request()))

    for sealed in (True, False):
        async with open_connection_pair(server_handler=handler, sealed=sealed) as (client, _):
            await client.request([])
    assert seen == ["<bokbok_trio.CurrentRequest 0 of 'user'>", "<bokbok_trio.CurrentRequest 0>"]
    with pytest.raises(RuntimeError, match="no request is being handled here"):
        current_request()


async def test_a_handler_with_a_nursery_left_open_ends_with_its_connection() -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        await trio.open_nursery().__aenter__()
        await trio.sleep_forever()

    async with open_peer(handler) as (connection, peer):
        await peer.stream.send_all(req(1))
        await settle()
        await peer.stream.aclose()
        await connection.wait_closed()


async def test_a_handler_with_a_scope_left_open_ends_with_the_program() -> None:
    async def handler(connection: Connection, request: list[bytes]) -> None:
        trio.CancelScope().__enter__()
        await trio.sleep_forever()

    with trio.CancelScope() as scope:
        async with open_peer(handler) as (_, peer):
            await peer.stream.send_all(req(1))
            await settle()
            scope.cancel()
    assert scope.cancelled_caught


# ---- defects of our own ----


@pytest.mark.parametrize("call", ["request", "ping"])
@pytest.mark.parametrize("where", ["receive", "take"])
async def test_a_defect_of_our_own_is_logged_and_the_cause_of_what_is_raised(
    where: str, call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("ours")

    async with open_connection_pair(server_handler=echo, sealed=False) as (client, _):
        async with raw_peer(over_sockets=True) as (connection, peer):
            await settle()
            assert await client.request([]) == []
            monkeypatch.setattr(Session, where, fail)
            if where == "receive":
                await peer.send(b"ping")
                await settle()
            with pytest.raises(ConnectionLost, match="internal error: ours") as caught:
                await (connection.ping() if call == "ping" else connection.request([]))
            assert isinstance(caught.value.__cause__, ZeroDivisionError)
            monkeypatch.undo()
            await connection.wait_closed()
    record = next(record for record in caplog.records if "a defect of bokbok_trio" in record.message)
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None


async def test_a_block_left_in_another_task_is_an_error_at_once() -> None:
    block = bare_nursery()

    async def leave() -> None:
        with pytest.raises(RuntimeError, match="left in another task than it was entered in"):
            await block.__aexit__(None, None, None)

    await block.__aenter__()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(leave)
    await block.__aexit__(None, None, None)


async def test_a_stream_that_fails_to_close_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Stuck(trio.abc.Stream):
        def __init__(self, stream: trio.abc.Stream) -> None:
            self.stream = stream

        async def send_all(self, data: bytes | bytearray | memoryview) -> None:
            await self.stream.send_all(data)

        async def wait_send_all_might_not_block(self) -> None:
            await self.stream.wait_send_all_might_not_block()

        async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
            return await self.stream.receive_some(max_bytes)

        async def aclose(self) -> None:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await self.stream.aclose()
            raise ValueError("the door is stuck")

    async with open_connection_pair(sealed=False, wrap=Stuck) as (client, server):
        await client.aclose()
        await server.wait_closed()
    [record] = [record for record in caplog.records if "closing the stream failed" in record.message]
    assert record.exc_info is not None
    assert "the door is stuck" in str(record.exc_info[1])


def test_eagerly_started_work_may_be_gone_on_with_by_an_event_loop_that_sends_none() -> None:
    @coroutine
    def give(message: str) -> Generator[str, object, object]:
        return (yield message)

    async def work() -> None:
        assert await give("first") is None
        assert await give("second") is None
        assert await give("third") is None

    waits: list[str] = []
    task = start_eagerly(work(), contextvars.copy_context(), lambda: waits.append("waits"))
    assert [task.send(None) for _ in range(3)] == ["first", "second", "third"]
    with pytest.raises(StopIteration) as ended:
        task.send(None)
    assert ended.value.value is True
    assert waits == ["waits"]
