"""Servers: stopping, with and without a grace."""

from __future__ import annotations

from functools import partial

import pytest
import trio
import trio.testing

from bokbok_trio import (
    Connection,
    ConnectionClosed,
    ConnectionLost,
    ConnectionRefused,
    HandshakeError,
    Key,
    RemoteError,
    Server,
    open_connection,
    open_server,
    serve,
)
from bokbok_trio.testing import MemoryListener

from ..support.clients import client_of
from ..support.helpers import busy_handler, echo, settle

KEY = Key(bytes(range(32)))


class Oops(Exception):
    pass


async def test_the_log_says_whom_a_stopping_server_cancels(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    listener = MemoryListener()
    answers: list[object] = []
    async with open_server([listener], busy_handler, user_key={"alice": KEY, "bob": KEY}) as server:
        async with (
            client_of(listener, user="alice", key=KEY) as alice,
            client_of(listener, user="bob", key=KEY),
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(ask, alice, ["sleep", "100"], answers)
            await settle()
            nursery.start_soon(ask, alice, ["sleep", "100"], answers)
            await settle()
            server.stop(grace=2)
            await trio.sleep(1)
            assert "in flight" not in caplog.text
            await server.wait_stopped()
    [line] = [record.getMessage() for record in caplog.records if "in flight" in record.getMessage()]
    assert line.endswith("cancelling 2 requests in flight: 2 of user 'alice' at None (0, 2)")


async def ask(connection: Connection, fields: list[str], into: list[object]) -> None:
    try:
        into.append(await connection.request(fields))
    except (RemoteError, ConnectionLost, ConnectionClosed) as exc:
        into.append(exc)


async def test_stop_lets_what_is_in_flight_finish_and_runs_nothing_new(
    autojump_clock: trio.testing.MockClock,
) -> None:
    listener = MemoryListener()
    answers: list[object] = []
    async with open_server([listener], busy_handler) as server:
        async with client_of(listener, request_handler=echo) as client, client_of(listener) as idle:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, client, ["sleep", "3"], answers)
                await settle()
                server.stop(grace=5)
                await idle.wait_closed()
                assert trio.current_time() == 0
                await ask(client, ["ping", "late"], answers)
                [refused] = answers
                assert isinstance(refused, ConnectionLost)
                assert not refused.may_have_run
                with pytest.raises(trio.BrokenResourceError):
                    listener.connect()
            assert answers[1:] == [[b"slept"]]
            await client.wait_closed()
            await server.wait_stopped()
            assert trio.current_time() == 3


async def test_a_handler_in_flight_may_call_back_while_stopping(
    autojump_clock: trio.testing.MockClock,
) -> None:
    listener = MemoryListener()

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        assert connection.server is not None
        connection.server.stop()
        await trio.sleep(1)
        return await connection.request(["still there?"])

    async with open_server([listener], handler) as server:
        async with client_of(listener, request_handler=echo) as client:
            assert await client.request([]) == [b"still there?"]
        await server.wait_stopped()
        assert trio.current_time() == 1


@pytest.mark.parametrize(("graces", "end"), [((5,), 5), ((0,), 0), ((5, 2), 2), ((2, 5), 2)])
async def test_what_does_not_finish_in_the_grace_is_cancelled(
    graces: tuple[int, ...], end: float, autojump_clock: trio.testing.MockClock
) -> None:
    listener = MemoryListener()
    answers: list[object] = []
    async with open_server([listener], busy_handler) as server:
        async with client_of(listener) as client, trio.open_nursery() as nursery:
            nursery.start_soon(ask, client, ["sleep", "100"], answers)
            await settle()
            for grace in graces:
                server.stop(grace)
            await server.wait_stopped()
            assert trio.current_time() == end
    [lost] = answers
    assert isinstance(lost, ConnectionLost)
    assert lost.reason == "the peer closed the connection, which it was draining, as a stopping server does"


async def test_wait_stopped_from_a_handler_ends_with_the_grace(
    autojump_clock: trio.testing.MockClock,
) -> None:
    listener = MemoryListener()

    async def handler(connection: Connection, request: list[bytes]) -> None:
        assert connection.server is not None
        connection.server.stop(grace=2)
        await connection.server.wait_stopped()

    async with open_server([listener], handler), client_of(listener) as client:
        with pytest.raises(ConnectionLost):
            await client.request([])
        assert trio.current_time() == 2


@pytest.mark.parametrize("grace", [-1, float("nan")])
async def test_a_grace_that_is_none(grace: float) -> None:
    async with open_server([MemoryListener()], echo) as server:
        with pytest.raises(ValueError, match="grace"):
            server.stop(grace)


async def test_stopping_does_not_wait_for_strangers(autojump_clock: trio.testing.MockClock) -> None:
    listener = MemoryListener()
    async with open_server([listener], echo) as server:
        stranger = listener.connect()
        await settle()
        server.stop()
        await server.wait_stopped()
        assert await stranger.receive_some() == b""
    assert trio.current_time() == 0


async def test_whoever_comes_to_the_end_of_the_handshake_while_stopping_is_refused(
    autojump_clock: trio.testing.MockClock,
) -> None:
    listener = MemoryListener()

    async def slow(user: str) -> Key:
        await trio.sleep(1)
        return KEY

    async with open_server([listener], busy_handler, user_key=slow) as server:
        async with client_of(listener, user="u", key=KEY) as client, trio.open_nursery() as nursery:
            nursery.start_soon(client.request, ["sleep", "3"])
            await settle()

            async def connect() -> None:
                with pytest.raises(ConnectionRefused) as caught:
                    async with client_of(listener, user="u", key=KEY):
                        raise AssertionError
                assert caught.value.code == "stopping"

            nursery.start_soon(connect)
            await settle()
            server.stop()


async def test_a_connection_that_opens_as_the_server_stops_is_drained() -> None:
    """It was admitted, and `accepted` is on its way, when stop() is called."""
    listener = MemoryListener()
    async with open_server([listener], echo) as server:
        stream = listener.connect()
        async with trio.open_nursery() as nursery:

            async def stop_when_admitted() -> None:
                while not server.statistics().connections:
                    await trio.lowlevel.checkpoint()
                server.stop()

            nursery.start_soon(stop_when_admitted)
            with pytest.raises((ConnectionLost, HandshakeError)):
                async with open_connection(stream) as client:
                    await client.wait_closed()
                    await client.request([])
        await server.wait_stopped()


async def test_cancelling_serve_ends_all_at_once(autojump_clock: trio.testing.MockClock) -> None:
    listener = MemoryListener()
    answers: list[object] = []
    closed: list[Connection] = []

    async def on_close(connection: Connection) -> None:
        closed.append(connection)

    async with trio.open_nursery() as outer, trio.open_nursery() as nursery:
        server: Server = await nursery.start(partial(serve, [listener], busy_handler, close_handler=on_close))
        async with client_of(listener) as client:
            outer.start_soon(ask, client, ["sleep", "100"], answers)
            await settle()
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await server.wait_stopped()
                assert len(closed) == 1
    assert trio.current_time() == 0
    assert len(answers) == 1


async def test_leaving_the_block_by_an_exception_gives_no_grace(
    autojump_clock: trio.testing.MockClock,
) -> None:
    listener = MemoryListener()
    answers: list[object] = []
    async with trio.open_nursery() as nursery:
        with pytest.raises(Oops):
            async with open_server([listener], busy_handler):
                client = await nursery.start(hold_open, listener)
                nursery.start_soon(ask, client, ["sleep", "100"], answers)
                await settle()
                raise Oops
        assert trio.current_time() == 0
        nursery.cancel_scope.cancel()
    assert len(answers) == 1


async def hold_open(
    listener: MemoryListener, task_status: trio.TaskStatus[Connection] = trio.TASK_STATUS_IGNORED
) -> None:
    async with client_of(listener) as client:
        task_status.started(client)
        await trio.sleep_forever()
