"""Servers: the handlers that a connection calls as it opens and closes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

from bokbok_trio import Connection, ConnectionLost, HandshakeError, Key, PeerCredentials, open_server
from bokbok_trio.testing import MemoryListener, open_connection_pair

from ..support.clients import GivenListener, client_of, client_over_socket
from ..support.helpers import echo, settle

KEY = Key(bytes(range(32)))


class Oops(Exception):
    pass


async def test_the_open_handler_comes_before_requests_and_may_make_some() -> None:
    story: list[object] = []
    listener = MemoryListener()

    async def on_open(connection: Connection) -> None:
        connection.data = "set"
        story.append(await connection.request(["who?"]))
        await settle()
        story.append("open")

    async def handler(connection: Connection, request: list[bytes]) -> None:
        await trio.lowlevel.checkpoint()
        story.append((connection.data, request))

    async def on_close(connection: Connection) -> None:
        await trio.lowlevel.checkpoint()
        story.append("close")

    async with open_server([listener], handler, open_handler=on_open, close_handler=on_close):
        async with client_of(listener, request_handler=echo) as client:
            await client.request(["early"])
            with trio.CancelScope() as scope:
                scope.cancel()
                await client.request(["cancelled early"])
    assert story == [[b"who?"], "open", ("set", [b"early"]), "close"]


async def test_a_request_cancelled_before_the_open_handler_is_done_is_not_handled() -> None:
    handled: list[list[bytes]] = []
    listener = MemoryListener()
    may_open = trio.Event()

    async def on_open(connection: Connection) -> None:
        await may_open.wait()

    async def handler(connection: Connection, request: list[bytes]) -> None:
        await trio.lowlevel.checkpoint()
        handled.append(request)

    async with open_server([listener], handler, open_handler=on_open):
        async with client_of(listener) as client, trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                nursery.start_soon(cancel_when_settled, scope)
                await client.request(["cancelled"])
            nursery.start_soon(client.request, ["wanted"])
            await settle()
            may_open.set()
    assert handled == [[b"wanted"]]


async def cancel_when_settled(scope: trio.CancelScope) -> None:
    await settle()
    scope.cancel()


async def fail(connection: Connection) -> None:
    await trio.lowlevel.checkpoint()
    raise Oops("on purpose")


async def close_own(connection: Connection) -> None:
    await connection.aclose()


@pytest.mark.parametrize(("on_open", "logs"), [(fail, 1), (close_own, 0)])
async def test_an_open_handler_that_does_not_return_closes_the_connection(
    on_open: Callable[[Connection], Awaitable[object]], logs: int, caplog: pytest.LogCaptureFixture
) -> None:
    closed: list[Connection] = []

    async def on_close(connection: Connection) -> None:
        closed.append(connection)

    listener = MemoryListener()
    async with open_server([listener], echo, open_handler=on_open, close_handler=on_close):
        for _ in range(2):
            async with client_of(listener) as client:
                with pytest.raises(ConnectionLost, match="the peer closed the connection"):
                    await client.request([])
    assert closed == []
    assert caplog.text.count("the open handler failed\nTraceback") == 2 * logs


async def test_an_open_handler_is_cancelled_when_the_peer_goes() -> None:
    story: list[str] = []
    listener = MemoryListener()

    async def on_open(connection: Connection) -> None:
        try:
            await trio.sleep_forever()
        finally:
            story.append("cancelled")

    async with open_server([listener], echo, open_handler=on_open):
        async with client_of(listener):
            await settle()
        await settle()
        assert story == ["cancelled"]


async def test_a_failing_close_handler_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with open_connection_pair(client_close_handler=fail, server_close_handler=fail):
        pass
    assert caplog.text.count("the close handler failed") == 2
    assert caplog.text.count("Oops: on purpose") == 2


@pytest.mark.parametrize("where", ["open", "close", "request", "user_key", "peer_user"])
async def test_what_ends_the_program_ends_the_server_and_comes_out_bare(where: str) -> None:
    async def leave(*args: object) -> Any:
        await trio.lowlevel.checkpoint()
        raise SystemExit(3)

    def leave_at_once(credentials: PeerCredentials) -> str:
        raise SystemExit(3)

    listener = GivenListener()
    handlers: dict[str, dict[str, Any]] = {
        "open": {"open_handler": leave},
        "close": {"close_handler": leave},
        "request": {},
        "user_key": {"user_key": leave},
        "peer_user": {"peer_user": leave_at_once},
    }

    async def connect() -> None:
        keys: dict[str, Any] = {"user": "user", "key": KEY} if where == "user_key" else {}
        connecting = client_over_socket(listener) if where == "peer_user" else client_of(listener, **keys)
        with pytest.raises((HandshakeError, ConnectionLost)):
            async with connecting as client:
                await client.request([])
                await client.aclose()
                await client.request([]) if where != "close" else None
                raise ConnectionLost("closed as it should")

    with pytest.raises(SystemExit) as caught:
        async with open_server([listener], leave if where == "request" else echo, **handlers[where]):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connect)
            await trio.sleep_forever()
    assert caught.value.code == 3
