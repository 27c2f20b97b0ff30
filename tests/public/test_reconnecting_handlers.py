"""Reconnecting connections: the handlers of each connection."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from bokbok_trio import Connection, ConnectionClosed, ReconnectingConnection, open_reconnecting

from ..support.helpers import echo, settle
from ..support.network import A, Network, drop


class Oops(Exception):
    pass


async def test_handlers_of_the_other_sides_requests_work_on_each_connection(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    seen: list[Connection] = []

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        seen.append(connection)
        return await echo(connection, request)

    async with network.server() as server, open_reconnecting(A, request_handler=handler) as client:
        for count in range(1, 4):
            assert await client.request(["back", str(count)]) == [str(count).encode()]
            assert len(seen) == count
            assert seen[-1] is client.connection
            await drop(server)
    assert len(set(seen)) == 3


async def test_a_handler_may_ask_the_reconnecting_connection_and_close_it(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    story: list[str] = []
    clients: list[ReconnectingConnection] = []

    async def handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        [client] = clients
        if request == [b"close"]:
            try:
                await client.aclose()
            finally:
                story.append("handler ended")
        return await client.request(["ping", *request])

    async with network.server(), open_reconnecting(A, request_handler=handler) as client:
        clients.append(client)
        assert await client.request(["back", "x"]) == [b"pong", b"x"]
        with pytest.raises(ConnectionClosed):
            await client.request(["back", "close"])
        assert client.closed
        await settle()
        assert story == ["handler ended"]


async def test_the_open_handler_comes_first_and_the_close_handler_last(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    story: list[str] = []

    async def server_handler(connection: Connection, request: list[bytes]) -> list[bytes]:
        story.append(f"server: {request[0].decode()}")
        return await echo(connection, request)

    async def ask_back(connection: Connection) -> None:
        async def ask() -> None:
            await connection.request(["to the client"])

        nursery.start_soon(ask)
        await trio.lowlevel.checkpoint()

    async def on_request(connection: Connection, request: list[bytes]) -> list[bytes]:
        story.append("client: request")
        return request

    async def on_open(connection: Connection) -> None:
        opened.append(connection)
        story.append("open")
        await connection.request(["subscribe"])
        await trio.sleep(1)
        story.append("opened")

    async def on_close(connection: Connection) -> None:
        assert connection.closed
        closed.append(connection)
        await trio.lowlevel.checkpoint()
        story.append("close")

    opened: list[Connection] = []
    closed: list[Connection] = []
    async with trio.open_nursery() as nursery:
        async with network.server(server_handler, open_handler=ask_back) as server:
            async with open_reconnecting(
                A, request_handler=on_request, open_handler=on_open, close_handler=on_close
            ) as client:
                assert client.connection is opened[0]
                await settle()
                expected = ["open", "server: subscribe", "opened", "client: request"]
                assert story == expected
                await drop(server)
                story.append("lost")
                assert client.connection is None
                await client.request(["mine"])
                assert client.connection is opened[1]
                assert sorted(story[4:-2]) == sorted(["close", "lost", *expected[:3]])
                assert sorted(story[-2:]) == ["client: request", "server: mine"]
                assert story.index("close") == 4
            assert story[-1] == "close"
    assert opened == closed
    assert len(opened) == 2


async def test_an_open_handler_that_fails_closes_its_connection_and_the_next_is_tried(
    network: Network, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    opened: list[Connection] = []

    async def on_open(connection: Connection) -> None:
        opened.append(connection)
        await trio.lowlevel.checkpoint()
        if len(opened) in {1, 2, 4}:
            raise Oops

    async def on_close(connection: Connection) -> None:
        await trio.lowlevel.checkpoint()
        closed.append(connection)
        raise Oops

    closed: list[Connection] = []
    async with network.server() as server:
        async with open_reconnecting(A, open_handler=on_open, close_handler=on_close) as client:
            assert client.connection is opened[2]
            assert network.times == [0, 0.2, 0.6]
            await drop(server)
            assert await client.request(["ping", "x"]) == [b"pong", b"x"]
            assert client.connection is opened[4]
    assert closed == [opened[2], opened[4]]
    assert caplog.text.count("the open handler failed\nTraceback") == 3
    assert caplog.text.count("the close handler failed\nTraceback") == 2


async def test_an_open_handler_is_cancelled_when_its_connection_is_lost(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    story: list[str] = []

    async def on_open(connection: Connection) -> None:
        if len(network.dialled) == 1:
            try:
                await trio.sleep_forever()
            finally:
                story.append("cancelled")

    async with trio.open_nursery() as nursery:

        async def lose() -> None:
            await trio.sleep(3)
            await network.cut()

        nursery.start_soon(lose)
        async with network.server(), open_reconnecting(A, open_handler=on_open) as client:
            assert client.connection
            assert story == ["cancelled"]


async def test_an_open_handler_that_returns_late_does_not_bring_back_its_connection(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    returned: list[Connection] = []

    async def on_open(connection: Connection) -> None:
        if len(network.dialled) == 2:
            with trio.move_on_after(5, shield=True):
                await trio.sleep_forever()
        returned.append(connection)

    async with network.server() as server, open_reconnecting(A, open_handler=on_open) as client:
        await drop(server)
        await trio.sleep(0.3)
        await drop(server)
        await client.request(["ping", "x"])
        current = client.connection
        assert returned[1:] == [current]
        await trio.sleep(10)
        assert len(returned) == 3
        assert client.connection is current is not None
        assert len(network.dialled) == 3


@pytest.mark.parametrize("nested", [False, True])
async def test_an_open_handler_that_asks_the_client_is_told_so(
    network: Network, nested: bool, autojump_clock: trio.testing.MockClock
) -> None:
    clients: list[ReconnectingConnection] = []
    caught: list[RuntimeError] = []

    async def ask() -> None:
        with pytest.raises(RuntimeError, match="the connection that it was given") as info:
            await clients[0].request([])
        caught.append(info.value)

    async def on_open(connection: Connection) -> None:
        await trio.lowlevel.checkpoint()
        if clients and nested:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
        elif clients:
            await ask()

    async with network.server() as server, open_reconnecting(A, open_handler=on_open) as client:
        clients.append(client)
        await drop(server)
        assert await client.request(["ping", "x"]) == [b"pong", b"x"]
    assert len(caught) == 1


async def test_a_close_handler_may_ask_the_next_connection(
    network: Network, autojump_clock: trio.testing.MockClock
) -> None:
    clients: list[ReconnectingConnection] = []
    outcomes: list[object] = []

    async def on_close(connection: Connection) -> None:
        try:
            outcomes.append(await clients[0].request(["ping", "again"]))
        except ConnectionClosed:
            outcomes.append("closed")

    async def on_open(connection: Connection) -> None:
        await trio.lowlevel.checkpoint()

    async with (
        network.server() as server,
        open_reconnecting(A, open_handler=on_open, close_handler=on_close) as client,
    ):
        clients.append(client)
        await drop(server)
        await trio.sleep(1)
        assert outcomes == [[b"pong", b"again"]]
    assert outcomes[1:] == ["closed"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["request_handler", "open_handler", "close_handler"])
async def test_what_ends_the_program_comes_out_bare(
    network: Network, where: str, error: type[BaseException], autojump_clock: trio.testing.MockClock
) -> None:
    async def handler(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise error

    handlers: dict[str, Any] = {where: handler}
    with pytest.raises(error) as caught:
        async with network.server() as server, open_reconnecting(A, **handlers) as client:
            if where == "request_handler":
                await client.request(["back"])
            await drop(server)
            await trio.sleep_forever()
    assert type(caught.value) is error
