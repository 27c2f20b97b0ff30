"""The error on the other side, and the logs, when one side stops, is cancelled, or has no room."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from bokbok_trio import (
    Connection,
    ConnectionLost,
    ConnectionRefused,
    HandshakeError,
    Key,
    Server,
    Settings,
    open_connection,
    open_reconnecting,
    open_server,
    serve,
)
from bokbok_trio._protocol.handshake import MAX_REASON_SIZE
from bokbok_trio.testing import MemoryListener
from tests.support.inside import break_transport, refuse_for_too_many

KEY = Key(bytes(range(32)))

STOPPED = "the peer closed the connection, which it was draining, as a stopping server does"

plain_and_sealed = pytest.mark.parametrize("sealed", [False, True])


async def hang(connection: Connection, request: list[bytes]) -> list[bytes]:
    await trio.sleep_forever()
    raise AssertionError


async def echo(connection: Connection, request: list[bytes]) -> list[bytes]:
    return request


def server_keys(sealed: bool) -> dict[str, Any]:
    return {"user_key": {"alice": KEY}} if sealed else {}


def client_keys(sealed: bool) -> dict[str, Any]:
    return {"user": "alice", "key": KEY} if sealed else {}


async def wait_for_handlers(server: Server, number: int = 1) -> None:
    with trio.fail_after(5):
        while server.statistics().handlers_running < number:
            await trio.sleep(0.005)


@asynccontextmanager
async def asking(server: Server, sealed: bool, lost: list[ConnectionLost]) -> AsyncGenerator[None]:
    """A client whose request is in flight in the block, and is lost by the end of it."""

    async def ask() -> None:
        async with open_connection(server.addresses[0], **client_keys(sealed)) as connection:
            with pytest.raises(ConnectionLost) as caught:
                await connection.request(["x"])
            lost.append(caught.value)

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await wait_for_handlers(server)
            yield


@plain_and_sealed
@pytest.mark.parametrize("grace", [0, 0.05])
async def test_whose_request_outlives_the_grace_is_told_that_the_server_stops(
    sealed: bool, grace: float
) -> None:
    lost: list[ConnectionLost] = []
    async with open_server("127.0.0.1:0", hang, **server_keys(sealed)) as server:
        async with asking(server, sealed, lost):
            server.stop(grace)
    assert STOPPED in str(lost[0])
    assert lost[0].may_have_run


async def serve_in(
    scope: trio.CancelScope, handler: Any, sealed: bool, task_status: trio.TaskStatus[Server]
) -> None:
    with scope:
        await serve("127.0.0.1:0", handler, **server_keys(sealed), task_status=task_status)


@plain_and_sealed
@pytest.mark.parametrize("stops_too", [False, True])
async def test_whose_server_is_cancelled_is_told_that_it_stops(sealed: bool, stops_too: bool) -> None:
    lost: list[ConnectionLost] = []
    scope = trio.CancelScope()
    async with trio.open_nursery() as nursery:
        server = await nursery.start(serve_in, scope, hang, sealed)
        async with asking(server, sealed, lost):
            if stops_too:
                server.stop()
            scope.cancel()
    assert STOPPED in str(lost[0])
    assert lost[0].may_have_run


@plain_and_sealed
async def test_answers_that_were_queued_leave_before_a_cancelled_server_says_the_end(sealed: bool) -> None:
    scope = trio.CancelScope()
    lost: list[ConnectionLost] = []

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        if request == [b"last"]:
            scope.cancel()
            return [b"answered"]
        return await hang(connection, request)

    async with trio.open_nursery() as nursery:
        server = await nursery.start(serve_in, scope, handler, sealed)
        async with open_connection(server.addresses[0], **client_keys(sealed)) as connection:
            async with asking(server, sealed, lost):
                answer = await connection.request(["last"])
    assert answer == [b"answered"]
    assert STOPPED in str(lost[0])


@plain_and_sealed
async def test_a_client_that_is_cancelled_has_not_been_cut_short(sealed: bool) -> None:
    """Ctrl-C and time limits are no attacks: they must not read so in the log of a server."""
    reasons: list[str | None] = []
    closed = trio.Event()

    async def close_handler(connection: Connection) -> None:
        reasons.append(connection.reason)
        closed.set()

    async with open_server("127.0.0.1:0", hang, close_handler=close_handler, **server_keys(sealed)) as server:
        with trio.CancelScope() as scope:
            async with open_connection(server.addresses[0], **client_keys(sealed)) as connection:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(connection.request, ["x"])
                    await wait_for_handlers(server)
                    scope.cancel()
        with trio.fail_after(5):
            await closed.wait()
    assert reasons[0] is not None
    assert reasons[0].startswith("the peer closed the connection (")


async def test_a_cancelled_connection_over_a_stream_that_must_be_waited_for_ends_all_the_same() -> None:
    listener = MemoryListener()
    async with open_server([listener], hang):
        with trio.move_on_after(0.05) as scope:
            async with open_connection(listener.connect()) as connection:
                await connection.request(["x"])
    assert scope.cancelled_caught


# ---- no room ----


async def test_who_finds_no_room_is_told_which_bound_that_is() -> None:
    listener = MemoryListener()
    async with open_server([listener], echo, settings=Settings(max_connections=1)):
        async with open_connection(listener.connect()):
            with pytest.raises(
                ConnectionRefused, match=r"see its max_connections\); try again later"
            ) as caught:
                async with open_connection(listener.connect()):
                    raise AssertionError
    assert caught.value.code == "busy"


async def test_a_user_with_the_longest_name_is_told_of_its_bound_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    listener = MemoryListener()
    user = "\u00e9" * 127
    settings = Settings(max_connections_per_user=1)
    async with open_server([listener], echo, user_key={user: KEY}, settings=settings):
        async with open_connection(listener.connect(), user=user, key=KEY):
            with pytest.raises(
                ConnectionRefused, match=r"this user has 1 connections.*max_connections_per_user"
            ):
                async with open_connection(listener.connect(), user=user, key=KEY):
                    raise AssertionError
    assert f"user {user!r} has 1 connections already (max_connections_per_user)" in caplog.text


def test_what_a_refused_client_is_told_fits() -> None:
    assert len(refuse_for_too_many(10**60).encode()) <= MAX_REASON_SIZE


# ---- orderly ends in the log of a client that reconnects ----


def levels(caplog: pytest.LogCaptureFixture, text: str) -> set[str]:
    found = [record for record in caplog.records if re.search(text, record.message)]
    return {record.levelname for record in found}


@pytest.mark.parametrize("has_asked", [False, True])
async def test_an_orderly_redeploy_is_no_warning(
    has_asked: bool, caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "sock"
    async with open_server(path, echo) as first:
        async with open_reconnecting(path) as client:
            if has_asked:
                await client.request(["x"])
            first.stop()
            await first.wait_stopped()
            async with open_server(path, echo):
                with trio.fail_after(5):
                    assert await client.request(["y"]) == [b"y"]
    assert levels(caplog, "done with the connection") == {"INFO"}


async def test_closing_or_draining_the_current_connection_is_no_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    async with open_server("127.0.0.1:0", echo) as server, open_reconnecting(server.addresses) as client:
        for end in ("drain", "aclose"):
            connection = client.connection
            assert connection is not None
            if end == "drain":
                connection.drain()
            else:
                await connection.aclose()
            with trio.fail_after(5):
                await connection.wait_closed()
                assert await client.request(["x"]) == [b"x"]
    assert levels(caplog, "done with the connection") == {"INFO"}
    assert levels(caplog, "no connection with") == set()


async def test_draining_a_connection_with_a_request_in_flight_is_no_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    handling, may_end = trio.Event(), trio.Event()

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        if request == [b"long"]:
            handling.set()
            await may_end.wait()
        return request

    async with (
        open_server("127.0.0.1:0", handler) as server,
        open_reconnecting(server.addresses) as client,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(client.request, ["long"])
        await handling.wait()
        assert client.connection is not None
        client.connection.drain()
        with trio.fail_after(5):
            assert await client.request(["x"]) == [b"x"]
        assert levels(caplog, "done with the connection") == {"INFO"}
        may_end.set()


async def test_a_connection_that_is_lost_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with open_server("127.0.0.1:0", echo) as server, open_reconnecting(server.addresses) as client:
        connection = client.connection
        while not server.connections:
            await trio.sleep(0.001)
        [other_end] = server.connections
        await break_transport(other_end)
        assert connection is not None
        with trio.fail_after(5):
            await connection.wait_closed()
            await client.request(["x"])
    assert levels(caplog, "done with the connection with") == {"WARNING"}


async def test_a_server_that_refuses_because_it_stops_is_no_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    looking, may_go = trio.Event(), trio.Event()

    async def look_up(user: str) -> Key:
        looking.set()
        await may_go.wait()
        return KEY

    async def connect(address: Any) -> None:
        async with open_reconnecting(address, user="alice", key=KEY):
            raise AssertionError

    async with trio.open_nursery() as nursery:
        async with open_server("127.0.0.1:0", echo, user_key=look_up) as server:
            nursery.start_soon(connect, server.addresses[0])
            await looking.wait()
            server.stop()
            may_go.set()
            await server.wait_stopped()
        with trio.fail_after(5):
            while not levels(caplog, "ConnectionRefusedError"):
                await trio.sleep(0.005)
        nursery.cancel_scope.cancel()
    assert levels(caplog, "the server refused: 'the server is stopping'") == {"INFO"}
    assert levels(caplog, "no connection with 127.0.0.1:.*: the server is stopping") == {"INFO"}
    assert levels(caplog, "ConnectionRefusedError") == {"WARNING"}


async def test_a_handshake_that_a_stopping_server_ends_is_no_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    looking = trio.Event()

    async def look_up(user: str) -> Key:
        looking.set()
        await trio.sleep_forever()
        raise AssertionError

    async def connect(address: Any) -> None:
        with pytest.raises(HandshakeError):
            async with open_connection(address, user="alice", key=KEY):
                raise AssertionError

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            async with open_server("127.0.0.1:0", echo, user_key=look_up) as server:
                nursery.start_soon(connect, server.addresses[0])
                await looking.wait()
                server.stop(grace=0)
    assert levels(caplog, "the server stopped during the handshake") == {"INFO"}
